"""`experiments/dpo_hh.py` on real preferences with a real small model."""

import gzip
import json
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from paxo import experiment, loading
from paxo.data.sources import load_records
from paxo.models.pretrained import load_params, read_config
from paxo.models.sharding import make_mesh
from tests.made_run import PROJECT, metrics, paxo, paxo_process, results, weights

DPO_HH = PROJECT / "experiments" / "dpo_hh.py"
# Short rows and few of them, for seconds instead of minutes.
SMALL = [
    "data.limits.max_prompt=64",
    "data.limits.max_completion=32",
    "data.max_records=60",
    "train.rows_per_batch=8",
    "train.log_every=1",
]


def flags(shared_data, *settings, data="pairs_hh_harmless"):
    return [
        "--set",
        f"data.path={shared_data / data}",
        f"model.path={shared_data / 'model_stories260k'}",
        *settings,
    ]


@pytest.fixture(scope="module")
def small_run(shared_data, tmp_path_factory):
    """The folder of a run of two steps."""
    workdir = tmp_path_factory.mktemp("hh")
    settings = flags(shared_data, *SMALL, "train.num_steps=2")
    assert paxo("run", DPO_HH, "--workdir", workdir, *settings) == 0
    return workdir


def test_dpo_hh_runs_without_an_edit_and_reports_accuracy_before_and_after(small_run):
    found = results(small_run)
    assert found["num_steps"] == 2
    assert found["heldout_accuracy"]["before"] == 0.5
    low, high = found["heldout_accuracy_interval"]["after"]
    assert low <= found["heldout_accuracy"]["after"] <= high
    first, last = (line for line in metrics(small_run) if "loss" in line)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["loss"] != first["loss"]
    assert first["padding/share"] < 0.3


def test_the_export_is_a_model_folder_with_the_tokenizer_of_the_first(small_run, shared_data):
    export = small_run / "export"
    start = shared_data / "model_stories260k"
    assert read_config(export) == read_config(start)
    assert (export / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    # The ids that stop generation are those of the model: `<s>` ends its texts.
    stops = [json.loads((f / "generation_config.json").read_text()) for f in (export, start)]
    assert stops[0]["eos_token_id"] == stops[1]["eos_token_id"]
    moved = jax.tree.map(
        lambda a, b: float(abs(a - b).max()), load_params(export), load_params(start)
    )
    assert 0 < max(jax.tree.leaves(moved)) < 1e-4  # two steps of a warm-up
    template = json.loads((export / "tokenizer_config.json").read_text())["chat_template"]
    assert "Human:" in template


@pytest.mark.parity
def test_transformers_loads_the_export_with_equal_logits(small_run):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from paxo.models.policy import make_policy

    export = small_run / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(export)
    talk = [{"role": "user", "content": "Once upon a time, what did the cat say?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    config, params = read_config(export), load_params(export)
    policy = make_policy(config)
    tokens = np.array([ids], np.int32)
    ones = np.ones_like(tokens)
    positions = np.arange(tokens.size, dtype=np.int32)[None]
    ours = policy.head(params, policy.trunk(params, tokens, positions, ones, 0 * ones))
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), wanted, atol=1e-4)


def tokens_of(shared_data, path, on_error="skip"):
    settings = experiment.settings_of(
        experiment.load(DPO_HH),
        [f"data.path={path}", "data.max_records=300", f"data.on_error={on_error}",
         f"model.path={shared_data / 'model_stories260k'}"],
    )  # fmt: skip
    model = loading.load_model(settings.model, make_mesh())
    tokenised = loading.read_data(settings.data, model.tokenizer, model.config)
    records, _ = load_records(path, on_error=on_error, limit=300)
    return model.tokenizer, records, tokenised.groups


def test_messages_transcripts_and_strings_of_one_pair_become_the_same_tokens(shared_data, tmp_path):
    folder = shared_data / "pairs_hh_harmless"
    tokenizer, records, messages = tokens_of(shared_data, folder / "pairs.jsonl.gz")
    transcripts = tokens_of(shared_data, folder / "original.jsonl.gz")[2]
    # The same pairs as strings, the prompt as the template writes it.
    lines = []
    for record in records:
        texts = [c[-1].content for c in record.completions]
        whole = [
            tokenizer.render([*record.prompt, c[-1]], generate=False) for c in record.completions
        ]
        prompt = tokenizer.prompt_text(record.prompt)
        chosen, rejected = (text.removeprefix(prompt) for text in whole)
        assert texts[0] in chosen
        lines.append(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    (tmp_path / "strings.jsonl").write_text("\n".join(lines))
    strings = tokens_of(shared_data, tmp_path / "strings.jsonl")[2]
    assert len(messages) > 290
    for other in (transcripts, strings):
        assert len(other) == len(messages)
        for a, b in zip(messages, other):
            np.testing.assert_array_equal(a.prompt, b.prompt)
            for k in range(2):
                np.testing.assert_array_equal(a.completions[k], b.completions[k])


def test_the_four_empty_replies_are_counted_and_left_out(shared_data, caplog):
    file = shared_data / "pairs_hh_harmless" / "pairs.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    empty = [
        i for i, row in enumerate(rows, start=1)
        if not row["chosen"][0]["content"].strip() or not row["rejected"][0]["content"].strip()
    ]  # fmt: skip
    with caplog.at_level("WARNING", logger="paxo"):
        records, skipped = load_records(file, on_error="skip")
    assert skipped["empty completion"] == len(empty)
    assert f"empty completion ({file}:{empty[0]})" in caplog.text
    assert len(records) == len(rows) - sum(skipped.values())


@pytest.mark.slow
def test_the_command_of_the_readme_raises_the_accuracy(shared_data, tmp_path):
    settings = flags(shared_data, "train.num_steps=20")
    assert paxo("run", DPO_HH, "--workdir", tmp_path, *settings) == 0
    found = results(tmp_path)
    assert found["heldout_accuracy"]["before"] == 0.5
    assert found["heldout_pairs"] > 150
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert lines[-1]["loss"] < np.log(2)


@pytest.mark.slow
def test_a_real_run_killed_and_started_again_ends_in_the_same_bits(shared_data, tmp_path):
    settings = flags(shared_data, *SMALL, "train.num_steps=24", "train.checkpoint_every=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(workdir):
        environment = os.environ | {"XLA_FLAGS": ""}
        return paxo_process("run", DPO_HH, "--workdir", workdir, *settings, env=environment)

    uninterrupted = start(whole)
    assert uninterrupted.wait(600) == 0, uninterrupted.stderr.read()
    process = start(killed)
    moment = random.uniform(0, 2)
    while not (killed / "checkpoints" / "4").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"it had finished {moment} s after the checkpoint"
    again = start(killed)
    assert again.wait(600) == 0, again.stderr.read()
    assert metrics(killed) == metrics(whole), moment
    assert results(killed) == results(whole)
    assert weights(killed) == weights(whole), moment
