"""DPO on Anthropic's helpful-and-harmless pairs, from any Llama-family model.

With a network, from the hub:

    paxo run experiments/dpo_hh.py --set model.path=meta-llama/Llama-3.2-1B-Instruct

From local files, a JSONL file or a folder of one and a model folder:

    paxo run experiments/dpo_hh.py --set data.path=pairs_hh_harmless model.path=model_stories260k \
        train.num_steps=200

The pairs have the columns `prompt`, `chosen`, `rejected`, as strings or as message lists; whole
transcripts in `chosen` and `rejected`, as on the hub, are split at their last shared turn.

With a 260K-parameter model, whose training knew only children's stories, 20 steps and 182 held-out
pairs of the harmless set: reward accuracy 0.500 before and 0.604 after (95 % interval 0.538 to
0.676).
"""

import paxo
from paxo.data.limits import TokenLimits
from paxo.experiment import DataSettings, Experiment, ModelSettings, TrainSettings

# Used where the tokenizer has no chat template: the form of Anthropic's transcripts.
HUMAN_ASSISTANT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def experiment() -> Experiment:
    """Settings of a 1B model on one accelerator, with the learning rate of the authors' code."""
    return Experiment(
        objective=paxo.objective("dpo", beta=0.1),
        optimizer=paxo.adamw(5e-7, warmup_steps=20, schedule="linear"),
        model=ModelSettings(
            path="meta-llama/Llama-3.2-1B-Instruct",
            chat_template=HUMAN_ASSISTANT,
            remat="none",
        ),
        data=DataSettings(
            path="hf:Anthropic/hh-rlhf:train",
            heldout=0.1,
            # Four replies of the harmless set are empty: they are counted and left out.
            on_error="skip",
            # Of a long dialogue the end of the prompt stays, and the beginning of the reply.
            limits=TokenLimits(
                max_prompt=384,
                max_completion=256,
                long_prompt="keep_end",
                long_completion="cut",
                long_group="drop",
            ),
        ),
        train=TrainSettings(
            num_steps=1000,
            rows_per_batch=16,
            evaluate_every=200,
            checkpoint_every=200,
            log_every=10,
        ),
    )
