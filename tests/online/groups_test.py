"""A round's file: written whole or not at all, read back to the bit, read by the offline path."""

import json

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend

import paxo
from paxo.data.packing import pack_groups, pad_rows
from paxo.data.row_shape import choose_shape
from paxo.data.sources import load_records
from paxo.data.tokenise import tokenise
from paxo.models.sharding import make_mesh
from paxo.online import METHODS, Group, read_groups, write_groups
from paxo.online.collect import Collected
from paxo.online.round_files import RoundFiles
from paxo.scoring import attach_logps, make_scorer
from paxo.training.state import init_state, snapshot
from paxo.training.step import make_train_step
from tests.made import tiny_policy
from tests.online import playing


def a_group(number=0, **changes):
    fields = {
        "prompt": np.array([1, 5, 9], np.int32),
        "completions": (np.array([6, 2], np.int32), np.array([7], np.int32)),
        "finished": (True, False),
        "labels": (1.0, 0.0),
        "extras": {
            "win_rates": np.array([0.1 + 0.2, 1 / 3]),
            "constraint_rewards:KD": np.array([[1.5, -2.0], [0.25, 1e-17]]),
            "margin": np.array(0.7),
        },
        "index": number,
        "source": f"round 0000, prompt {number}",
    }
    return Group(**(fields | changes))


def assert_same(found, group):
    assert found.prompt.tolist() == group.prompt.tolist()
    assert [c.tolist() for c in found.completions] == [c.tolist() for c in group.completions]
    assert (found.finished, found.labels) == (group.finished, group.labels)
    assert (found.index, found.source) == (group.index, group.source)
    assert set(found.extras) == set(group.extras)
    for name, value in group.extras.items():
        np.testing.assert_array_equal(found.extras[name], value)


def test_groups_are_read_back_to_the_bit(tmp_path):
    groups = [a_group(n) for n in range(3)]
    write_groups(tmp_path / "rounds" / "0000.jsonl", groups, lambda ids: " ".join(map(str, ids)))
    for found, group in zip(read_groups(tmp_path / "rounds" / "0000.jsonl"), groups):
        assert_same(found, group)
    row = json.loads((tmp_path / "rounds" / "0000.jsonl").read_text().splitlines()[0])
    assert row["texts"] == {"prompt": "1 5 9", "completions": ["6 2", "7"]}


def test_groups_and_rounds_lie_in_a_bucket_too(monkeypatch, tmp_path):
    memory = fsspec.filesystem("memory")  # of file objects that no disk stands behind
    monkeypatch.setattr(backend.fsspec_backend.__class__, "fs", lambda self, path: memory)
    (tmp_path / "bucket.txt").write_text("gs://a-bucket/run\n")
    files = RoundFiles(tmp_path)
    collected = Collected([a_group(n) for n in range(3)], {"tokens": 2.5})
    for drawn in (lambda: collected, None):  # the second time there is nothing to be drawn
        found = files.kept("0003", drawn)
        assert found.figures == collected.figures
        for ours, group in zip(found.groups, collected.groups, strict=True):
            assert_same(ours, group)
    assert str(files.groups("0003")) == "gs://a-bucket/run/rounds/0003.jsonl"
    assert sorted(path.name for path in files.folder.iterdir()) == ["0003.json", "0003.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["bucket.txt"]


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path):
    broken = a_group(1, extras={"rewards": "much"})
    with pytest.raises(ValueError):
        write_groups(tmp_path / "0000.jsonl", [a_group(), broken])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt_ids": [1]}'])
def test_a_line_that_is_no_group_is_named(line, tmp_path):
    file = tmp_path / "0000.jsonl"
    write_groups(file, [a_group()])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"0000.jsonl:2: not a row of a round's groups \("):
        read_groups(file)


class IdTokenizer:
    """What `tokenise` asks of a tokenizer where records are token ids already."""

    stop_ids, bos_id, vocab_size = (2,), None, 97

    def encode(self, texts):
        return [[] for _ in texts]

    def prompt_text(self, prompt):
        return ""


def test_the_offline_path_reads_a_round_as_it_was(tmp_path):
    game = playing.a_game()
    playing.play_game(game, METHODS["constrained"], tmp_path, rounds=1, prompts=8)
    file = tmp_path / "rounds" / "0000.jsonl"
    names = ["constraint_rewards:KD"]
    records, skipped = load_records(file, extras=names)
    groups = read_groups(file)
    assert skipped == {}
    assert len(records) == len(groups) == 8
    for record, group in zip(records, groups):
        assert record.prompt == tuple(group.prompt.tolist())
        assert record.completions == tuple(tuple(c.tolist()) for c in group.completions)
        assert record.labels == group.labels
        np.testing.assert_array_equal(record.extras[names[0]], np.float32(group.extras[names[0]]))


def test_dpo_trains_offline_on_a_round_that_was_kept(tmp_path):
    policy, params = tiny_policy()
    write_groups(tmp_path / "0000.jsonl", [a_group(n) for n in range(4)])
    records, _ = load_records(tmp_path / "0000.jsonl", extras=["win_rates"])
    groups = tokenise(records, IdTokenizer()).groups
    for found in groups:
        assert found.finished == (True, False)
        assert [c.tolist() for c in found.completions] == [[6, 2], [7]]
        np.testing.assert_array_equal(found.extras["win_rates"], np.float32([0.1 + 0.2, 1 / 3]))
    batch, _ = pack_groups(groups, choose_shape(groups, row_length=48))
    batch = pad_rows(batch, 2)
    objective, optimizer = paxo.objective("dpo"), paxo.adamw(1e-2)
    scorer = make_scorer(policy, snapshot(params), mesh=make_mesh(1, devices=jax.devices()[:1]))
    batch = attach_logps(batch, "reference", scorer)
    step = jax.jit(make_train_step(policy, objective, optimizer))
    state = init_state(params, objective, optimizer, jax.random.key(0))
    losses = []
    for _ in range(2):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[1] < losses[0]
