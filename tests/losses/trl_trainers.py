"""TRL's own loss methods, run on log-probs that a test chooses.

A trainer is made without its constructor and given the attributes that its loss method reads; a
model is a stand-in whose next-token distribution over two tokens gives token 0, the one of every
prompt and completion, the wanted log-prob. No formula of TRL's is repeated here.

`Made` are the numbers of a test; each other function takes the trained numbers as a torch tensor
and returns the loss that TRL's code makes of them, a scalar.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib
import types

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch and trl: pip install -e '.[parity]'")
pytest.importorskip("trl", reason="needs trl: pip install -e '.[parity]'")

import torch
from torch import nn

GROUPS, TOKENS, PROMPT = 5, 4, 2
REMOVED = ("BCOTrainer", "NashMDTrainer", "PRMTrainer", "XPOTrainer")
PROMPT_LOGP = -0.7  # of the prompt's second token, the first one that is predicted


@dataclasses.dataclass(frozen=True)
class Made:
    """Log-probs by token `[GROUPS, K, TOKENS]` of three policies, and what else losses read."""

    policy: np.ndarray
    reference: np.ndarray
    previous: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, candidates, seed, dtype):
        """Random numbers; completions of 1 to TOKENS tokens, every second group desirable."""
        rng = np.random.default_rng(seed)
        shape = (GROUPS, candidates, TOKENS)
        lengths = rng.integers(1, TOKENS + 1, shape[:-1])
        lengths[0], lengths[-1] = TOKENS, 1 + np.arange(candidates) % TOKENS
        policy, reference = rng.uniform(-2, -0.1, (2, *shape))
        arrays = [
            policy,
            reference,
            np.minimum(policy + rng.uniform(-0.8, 0.8, shape), -0.02),
            np.arange(TOKENS) < lengths[..., None],
            rng.normal(size=shape[:-1]),
            np.where(np.arange(GROUPS)[:, None] % 2 == 0, 1.0, -1.0) * np.ones(candidates),
            rng.normal(size=shape[:-1]),
        ]
        return cls(*(x if x.dtype == bool else x.astype(dtype) for x in arrays))

    @property
    def lengths(self):
        """`[GROUPS, K]` tokens of each completion."""
        return self.mask.sum(-1)


class TwoTokens(nn.Module):
    """Gives token 0 the log-probs `[N, T]` after a prompt, found by their number of columns."""

    is_gradient_checkpointing = False

    def __init__(self, *log_probs):
        super().__init__()
        self.tables = {x.shape[1]: x for x in log_probs}

    def forward(self, input_ids, labels=None, **_):
        wanted = self.tables[input_ids.shape[1] - PROMPT]
        prompt = wanted.new_full((len(wanted), PROMPT - 1), PROMPT_LOGP)
        last = wanted.new_full((len(wanted), 1), PROMPT_LOGP)  # predicts nothing that is read
        log_probs = torch.cat([prompt, wanted, last], 1)
        logits = torch.stack([log_probs, torch.log(-torch.expm1(log_probs))], -1)
        found = types.SimpleNamespace(logits=logits)
        if labels is not None:  # what TRL's fused head says of the labelled positions
            there = labels[:, 1:] != -100
            found.log_probs = log_probs[:, :-1].masked_fill(~there, 0)
            found.log_sum_sq_probs = torch.logsumexp(2 * logits, -1)[:, :-1].detach()
            found.entropy = torch.zeros_like(found.log_probs)
            found.mean_logits, found.is_top1 = found.entropy, there
        return found


class Alone:
    """An accelerator of one process, which keeps the loss that it is asked to differentiate."""

    device = torch.device("cpu")
    num_processes, process_index = 1, 0
    sync_gradients, is_main_process, use_distributed = True, True, False

    def gather(self, x, **_):
        return x

    gather_for_metrics = reduce = unwrap_model = gather

    def autocast(self):
        return contextlib.nullcontext()

    def backward(self, loss, **_):
        self.loss = loss


def trainer(module, name, **attributes):
    """A trainer of TRL's without its constructor; skips those that TRL has removed."""
    try:
        found = importlib.import_module(f"trl.{module}")
    except ModuleNotFoundError as error:
        if name not in REMOVED or not error.name.startswith("trl."):
            raise
        pytest.skip(f"{name}: TRL 1.13 was the last version that had it")
    made = object.__new__(getattr(found, name))
    lists = functools.partial(collections.defaultdict, list)
    vars(made).update(
        accelerator=Alone(),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        label_smoothing=0.0,
        _metrics={"train": lists(), "eval": lists()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    vars(made).update(attributes)
    return made


def _tensor(x):
    return torch.as_tensor(np.asarray(x))


def _by_candidate(x):
    """`[GROUPS, K, ...] -> [K * GROUPS, ...]`: all chosen, then all rejected."""
    return x.transpose(0, 1).flatten(0, 1)


def _sequences(mask):
    """Ids, attention and completion mask `[N, PROMPT + T]` around a completion mask `[N, T]`."""
    prompt = torch.ones(len(mask), PROMPT, dtype=torch.long)
    attention = torch.cat([prompt, mask.long()], 1)
    completion = torch.cat([0 * prompt, mask.long()], 1)
    return torch.zeros_like(attention), attention, completion


def _batch(mask):
    ids, attention, completion = _sequences(mask)
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def dpo(made, policy, *loss_types, weights=None, **settings):
    """`DPOTrainer`; `policy [GROUPS, 2, T]`."""
    model = TwoTokens(_by_candidate(policy))
    defaults = {
        "beta": 0.1,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "discopop_tau": 0.05,
    }
    settings = defaults | settings
    this = trainer(
        "trainer.dpo_trainer",
        "DPOTrainer",
        model=model,
        ref_model=TwoTokens(_by_candidate(_tensor(made.reference))),
        precompute_ref_logps=False,
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        args=types.SimpleNamespace(
            discopop_tau=settings["discopop_tau"], gradient_checkpointing_kwargs=None
        ),
        **settings,
    )
    return this._compute_loss(model, _batch(_by_candidate(_tensor(made.mask))), False)


def kto(made, policy, loss_type, **settings):
    """`KTOTrainer`; `policy [GROUPS, 2, T]`: completions, and mismatched ones for its KL."""
    # One column more tells the mismatched completions' table from the judged ones'.
    wider = lambda x: nn.functional.pad(x, (0, 1), value=-1.0)  # noqa: E731
    table = lambda x: TwoTokens(x[:, 0], wider(x[:, 1]))  # noqa: E731
    mask = _tensor(made.mask)
    ids, attention, completion = _sequences(nn.functional.pad(mask[:, 1], (0, 1)))
    mismatched = {
        "KL_input_ids": ids,
        "KL_attention_mask": attention,
        "KL_completion_mask": completion,
    }
    model = table(policy)
    this = trainer(
        "trainer.kto_trainer",
        "KTOTrainer",
        model=model,
        ref_model=table(_tensor(made.reference)),
        precompute_ref_logps=False,
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        args=types.SimpleNamespace(gradient_checkpointing_kwargs=None),
        **settings,
    )
    judged = _tensor(made.labels[:, 0] > 0)
    return this._compute_loss(model, _batch(mask[:, 0]) | mismatched | {"label": judged}, False)


def _labelled(made):
    """The batch of the older trainers: ids, masks and labels of chosen and rejected."""
    batch = {}
    for i, name in enumerate(("chosen", "rejected")):
        ids, attention, completion = _sequences(_tensor(made.mask)[:, i])
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = ids, attention
        batch[f"{name}_labels"] = ids.masked_fill(completion == 0, -100)
    return batch


def cpo(made, policy, loss_type, **settings):
    """`CPOTrainer`; `policy [GROUPS, 2, T]`."""
    settings = {"alpha": 0.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0, "pad_token_id": 0} | settings
    this = trainer("experimental.cpo.cpo_trainer", "CPOTrainer", loss_type=loss_type, **settings)
    return this.get_batch_loss_metrics(TwoTokens(_by_candidate(policy)), _labelled(made))[0]


def orpo(made, policy, **settings):
    """`ORPOTrainer`; `policy [GROUPS, 2, T]`."""
    this = trainer("experimental.orpo.orpo_trainer", "ORPOTrainer", padding_value=0, **settings)
    return this.get_batch_loss_metrics(TwoTokens(_by_candidate(policy)), _labelled(made))[0]


def tpo(made, policy, loss_type, **settings):
    """`TPOTrainer`; `policy [GROUPS, 3, T]`: chosen, rejected, gold."""
    model = TwoTokens(_by_candidate(policy))
    settings = {"tpo_l_gamma": 0.5, "model": model, "loss_type": loss_type} | settings
    this = trainer("experimental.tpo.tpo_trainer", "TPOTrainer", **settings)
    return this._compute_loss(model, _batch(_by_candidate(_tensor(made.mask))), False)


def online_dpo(made, policy, loss_type, beta):
    """`OnlineDPOTrainer`; `policy [GROUPS, 2, T]`, the better one told by `made.rewards`."""
    model, mask = TwoTokens(_by_candidate(policy)), _by_candidate(_tensor(made.mask))
    ids, attention, _ = _sequences(mask)
    sampled = (ids[:, :PROMPT], attention[:, :PROMPT], ids[:, PROMPT:], mask.long(), None)
    this = trainer(
        "experimental.online_dpo.online_dpo_trainer",
        "OnlineDPOTrainer",
        model=model,
        ref_model=TwoTokens(_by_candidate(_tensor(made.reference))),
        processing_class=types.SimpleNamespace(batch_decode=lambda x, **_: [""] * len(x)),
        reward_funcs=[None],
        eos_token_ids=[1],
        max_length=100,
        stats=collections.defaultdict(list),
        state=types.SimpleNamespace(global_step=0, epoch=0),
        args=types.SimpleNamespace(
            use_vllm=False,
            missing_eos_penalty=None,
            loss_type=loss_type,
            torch_empty_cache_steps=None,
            optim="adamw_torch",
            n_gpu=1,
            gradient_accumulation_steps=1,
        ),
        _beta=beta,
        _generate=lambda *_: sampled,
        _calculate_rewards_from_functions=lambda **_: _by_candidate(_tensor(made.rewards)),
    )
    this.training_step(model, {"prompt": [""] * GROUPS})
    return this.accelerator.loss


def group_policy_gradient(made, policy, module, name, args=None, **settings):
    """`GRPOTrainer` or `RLOOTrainer`, from rewards to the loss; `policy [GROUPS, K, T]`."""
    candidates, model = policy.shape[1], TwoTokens(policy.flatten(0, 1))
    completions = [[0] * n for n in made.lengths.ravel()]
    count = len(completions)
    generated = {
        "GRPOTrainer": (
            [[0] * PROMPT] * count,
            completions,
            None,
            [""] * count,
            None,
            {},
            None,
            [],
        ),
        "RLOOTrainer": ([[0] * PROMPT] * count, completions, [""] * count),
    }[name]
    empty = collections.defaultdict(list)
    options = {
        "per_device_train_batch_size": count,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": None,
        "steps_per_generation": 1,
        "delta": None,
        "use_bias_correction_kl": False,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
    }
    attributes = {
        "model": TwoTokens(_tensor(made.previous).flatten(0, 1)),
        "ref_model": TwoTokens(_tensor(made.reference).flatten(0, 1)),
        "args": types.SimpleNamespace(**options | (args or {})),
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "num_generations": candidates,
        "num_iterations": 2,  # the policy has moved since it sampled
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": TOKENS,
        "importance_sampling_level": "token",
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "reward_clip_range": None,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "mask_truncated_completions": False,
        "pad_to_multiple_of": None,
        "temperature": 1.0,
        "model_kwarg_keys": (),
        "environment_factories": None,
        "environments": None,
        "tools": None,
        "_is_vlm": False,
        "_entropy_bonus_enabled": False,
        "log_multimodal": False,
        "reward_func_names": ["reward"],
        "reward_funcs": [None],
        "reward_weights": torch.ones(1),
        "_tokenizer": types.SimpleNamespace(pad_token_id=0),
        "processing_class": types.SimpleNamespace(batch_decode=lambda x, **_: [""] * len(x)),
        "eos_token_ids": [1],
        "_logs": {
            "prompt": [],
            "completion": [],
            "advantages": [],
            "rewards": empty,
            "extra": empty,
        },
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "_generate": lambda *_: generated,
        "_calculate_rewards": lambda *_: _tensor(made.rewards).reshape(-1, 1),
    }
    this = trainer(module, name, **attributes | settings)
    inputs = this._generate_and_score_completions([{"prompt": ""}] * count)
    return this._compute_loss(model, inputs)


grpo = functools.partial(group_policy_gradient, module="trainer.grpo_trainer", name="GRPOTrainer")
rloo = functools.partial(group_policy_gradient, module="trainer.rloo_trainer", name="RLOOTrainer")


def reward(made, scores, margins=None, center_rewards_coefficient=None):
    """`RewardTrainer`; `scores [GROUPS, 2]`."""
    model = lambda **_: types.SimpleNamespace(logits=_by_candidate(scores)[:, None])  # noqa: E731
    args = types.SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient)
    inputs = {"attention_mask": torch.ones(1)}
    if margins is not None:
        inputs["margin"] = _tensor(margins)
    state = types.SimpleNamespace(training=True)
    this = trainer("trainer.reward_trainer", "RewardTrainer", args=args, model=state)
    return this.compute_loss(model, inputs)


def prm(made, values):
    """`PRMTrainer`; `values [GROUPS, 1, T]`, steps end at every token that is there."""
    from transformers import LlamaConfig, LlamaForTokenClassification

    logits = torch.stack([torch.zeros_like(values), values], -1)[:, 0]
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=3, num_hidden_layers=1, num_labels=2, **size)
    judge = LlamaForTokenClassification(config)
    judge.score.register_forward_hook(lambda *_: logits)
    right = _tensor(made.rewards[:, :1] > 0).long().expand(-1, TOKENS)
    labels = right.masked_fill(~_tensor(made.mask[:, 0]), -100)
    this = trainer(
        "experimental.prm.prm_trainer",
        "PRMTrainer",
        label_smoother=None,
        compute_loss_func=None,
        model_accepts_loss_kwargs=False,
        args=types.SimpleNamespace(past_index=-1, average_tokens_across_devices=False),
    )
    return this.compute_loss(judge, {"input_ids": torch.zeros_like(labels), "labels": labels})


def bco(made, policy, density=None, rounds=1, **settings):
    """`BCOTrainer`, its running mean fed with `rounds` batches; `policy [GROUPS, 1, T]`."""
    module = "experimental.bco.bco_trainer"
    this = trainer(
        module,
        "BCOTrainer",
        embedding_func=density is not None or None,
        embedding_tokenizer=density is not None or None,
        ref_model=TwoTokens(_tensor(made.reference)[:, 0]),
        args=types.SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0),
        _get_prompt_embeddings=lambda batch: (None, None),
        _get_chosen_prob=lambda _: _tensor(density).to(policy.dtype)[
            _tensor(made.labels[:, 0]) < 0
        ],
        **settings,
    )
    this.running = importlib.import_module(f"trl.{module}").RunningMoments(this.accelerator)
    ids, attention, completion = _sequences(_tensor(made.mask)[:, 0])
    batch = {
        "completion_input_ids": ids,
        "completion_attention_mask": attention,
        "completion_labels": ids.masked_fill(completion == 0, -100),
        "label": [bool(x > 0) for x in made.labels[:, 0]],
    }
    for _ in range(rounds - 1):
        this.get_batch_loss_metrics(TwoTokens(_tensor(made.previous)[:, 0]), batch)
    return this.get_batch_loss_metrics(TwoTokens(policy[:, 0]), batch)[0]


def xpo(made, policy, loss_type, beta, alpha):
    """`XPOTrainer`; `policy [GROUPS, 2, T]`: its own completions, and the reference's."""
    this = trainer(
        "experimental.xpo.xpo_trainer",
        "XPOTrainer",
        args=types.SimpleNamespace(loss_type=loss_type),
        _alpha=alpha,
        _beta=beta,
    )
    mask, reference = _tensor(made.mask), _tensor(made.reference)
    own, others = policy * mask, reference * mask
    first = _tensor(made.rewards[:, 0] >= made.rewards[:, 1])
    return this._compute_losses(own[:, 0], own[:, 1], others[:, 1], others[:, 0], first)[0]


def nash_md(made, policy, beta):
    """`NashMDTrainer`; `policy [GROUPS, 1, T]`, `made.rewards` ahead of the mixture's."""
    module = "experimental.nash_md.nash_md_trainer"
    this = trainer(module, "NashMDTrainer", _beta=beta)
    mask = _tensor(made.mask)[:, 0]
    own, fixed = policy[:, 0] * mask, _tensor(made.reference)[:, 0] * mask
    return this._compute_losses(own, fixed, torch.sigmoid(_tensor(made.rewards[:, 0])))[0]
