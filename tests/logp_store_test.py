"""The store of fixed log-probs: keys, bits, kills, damage, locks and full disks."""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from paxo.logp_store import LogpStore

POLICY = "sft step 500, float32"


def value_of(number):
    """A float32 whose last bits matter."""
    return np.float32(-np.pi * (number + 1))


def entries(numbers):
    return [("logps", [1, n], [2, n, 3], value_of(n)) for n in numbers]


def test_values_are_the_same_bits_before_and_after_reopening(tmp_path):
    rng = np.random.default_rng(0)
    scalar = np.float32(-0.1) / np.float32(3)
    tokens = rng.standard_normal(7).astype(np.float32)
    tokens[0] = -np.inf  # a token that the policy rules out
    written = [("logps", [1, 2], [3, 4], scalar), ("token_logps", [1, 2], [3, 4], tokens)]
    for attempt in range(2):
        with LogpStore(tmp_path, POLICY) as store:
            if attempt == 0:
                store.put_many(written)
            found = store.get("logps", [1, 2], [3, 4])
            assert isinstance(found, np.float32)
            assert found.tobytes() == scalar.tobytes()
            by_token = store.get("token_logps", np.array([1, 2]), np.array([3, 4], np.int64))
            assert by_token.dtype == np.float32
            assert by_token.tobytes() == tokens.tobytes()
            assert (len(store), store.hits, store.misses) == (2, 2, 0)


def test_policy_kind_and_the_border_between_prompt_and_completion_are_in_the_key(tmp_path):
    with LogpStore(tmp_path, POLICY) as store:
        store.put_many([("logps", [1, 2], [3], -1.0)])
        assert store.get("logps", [1], [2, 3]) is None
        assert store.get("logps", [1, 2, 3], []) is None
        assert store.get("token_logps", [1, 2], [3]) is None
        assert store.get("logps", [1, 2], [3]) == -1.0
        assert (store.hits, store.misses) == (1, 3)
    with LogpStore(tmp_path, "sft step 501, float32") as store:
        assert store.get("logps", [1, 2], [3]) is None
        store.put_many([("logps", [1, 2], [3], -2.0)])
    with LogpStore(tmp_path, POLICY) as store:
        assert store.get("logps", [1, 2], [3]) == -1.0


def test_a_sequence_is_stored_once_and_its_first_value_stays(tmp_path):
    with LogpStore(tmp_path, POLICY) as store:
        store.put_many([("logps", [1], [2], -1.0), ("logps", [1], [2], -2.0)])
        store.put_many([("logps", [1], [2], -3.0)])
        assert store.get("logps", [1], [2]) == -1.0
        size = (tmp_path / "0.bin").stat().st_size
        assert len(store) == 1
    # marker 4 + key 16 + kind 1 + length 4 + one float 4 + check 4
    assert size == 33


@pytest.mark.parametrize("lost", range(1, 33))
def test_a_torn_tail_is_dropped_wherever_it_is_torn(tmp_path, lost, caplog):
    with LogpStore(tmp_path, POLICY) as store:
        store.put_many(entries(range(3)))
    path = tmp_path / "0.bin"
    os.truncate(path, 3 * 33 - lost)
    with caplog.at_level(logging.WARNING), LogpStore(tmp_path, POLICY) as store:
        assert len(store) == 2
        assert path.stat().st_size == 2 * 33
        store.put_many(entries([2]))
    assert f"passed over {33 - lost} bytes of an unfinished write" in caplog.text
    with LogpStore(tmp_path, POLICY) as store:
        assert [store.get(*entry[:3]) for entry in entries(range(3))] == list(
            map(value_of, range(3))
        )


@pytest.mark.parametrize(
    "byte", [33, 40, 55, 57, 60, 65]
)  # marker, key, kind, length, value, check
def test_a_damaged_entry_is_passed_over_and_counted(tmp_path, byte, caplog):
    with LogpStore(tmp_path, POLICY) as store:
        store.put_many(entries(range(3)))
    data = bytearray((tmp_path / "0.bin").read_bytes())
    data[byte] ^= 0x40
    (tmp_path / "0.bin").write_bytes(data)
    with caplog.at_level(logging.WARNING), LogpStore(tmp_path, POLICY) as store:
        found = [store.get(*entry[:3]) for entry in entries(range(3))]
        assert found == [value_of(0), None, value_of(2)]
        store.put_many(entries([1]))
    assert "0.bin: passed over 1 damaged stretches" in caplog.text
    with LogpStore(tmp_path, POLICY) as store:
        assert len(store) == 3


def test_processes_write_files_of_their_own_and_read_one_another_after_reopening(tmp_path):
    with LogpStore(tmp_path, POLICY, process=0) as a, LogpStore(tmp_path, POLICY, process=1) as b:
        a.put_many(entries([0]))
        b.put_many([*entries([1]), ("token_logps", [5], [6, 7], np.float32([-1, -2]))])
        b.put_many([("logps", [1, 0], [2, 0, 3], -9.0)])  # which `a` has with another value
    for process, shared in ((0, value_of(0)), (1, -9.0)):
        with LogpStore(tmp_path, POLICY, process=process) as store:
            assert store.get("logps", [1, 0], [2, 0, 3]) == shared  # what this process wrote itself
            assert store.get("logps", [1, 1], [2, 1, 3]) == value_of(1)
            np.testing.assert_array_equal(store.get("token_logps", [5], [6, 7]), [-1, -2])


def test_a_second_writer_of_the_same_file_is_refused(tmp_path):
    with (
        LogpStore(tmp_path, POLICY),
        pytest.raises(OSError, match=r"0.bin is being written by another run: wait"),
    ):
        LogpStore(tmp_path, POLICY)
    LogpStore(tmp_path, POLICY).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"store .*file/store cannot be written .*name a folder"):
        LogpStore(tmp_path / "file" / "store", POLICY)


def test_nonsense_is_refused_and_nothing_is_stored(tmp_path):
    with LogpStore(tmp_path, POLICY) as store:
        for bad, message in (
            (("logps", [1], [2], np.nan), "a log-prob is NaN"),
            (("logps", [1], [2], np.zeros(3)), r"0 axes; got shape \(3,\)"),
            (("token_logps", [1], [2], -1.0), r"1 axes; got shape \(\)"),
            (("logits", [1], [2], -1.0), "kind must be one of"),
            (("logps", [1], [-1], -1.0), "completion must be a list of token ids"),
            (("logps", [1.5], [2], -1.0), "prompt must be a list of token ids"),
            (("logps", [1], [2**31], -1.0), "completion must be a list of token ids"),
        ):
            with pytest.raises(ValueError, match=message):
                store.put_many([*entries([0]), bad])
        assert len(store) == 0
    assert (tmp_path / "0.bin").stat().st_size == 0


def python(code, *args):
    """Start a Python process that runs the code."""
    root = pathlib.Path(__file__).resolve().parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )


WRITE_FOR_EVER = """
    import itertools, sys
    import numpy as np
    from paxo.logp_store import LogpStore
    store = LogpStore(sys.argv[1], "policy")
    for batch in itertools.count():
        store.put_many([
            ("token_logps", [batch], [k], np.full(200 * (k + 1), batch, np.float32))
            for k in range(8)
        ])
        print(batch, flush=True)
"""


def test_a_kill_loses_less_than_a_batch(tmp_path):
    for attempt in range(4):
        process = python(WRITE_FOR_EVER, tmp_path / str(attempt))
        for _ in range(20 + 7 * attempt):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        last = 19 + 7 * attempt + len(process.stdout.read().split())
        process.wait()
        with LogpStore(tmp_path / str(attempt), "policy") as store:
            for batch in range(last + 1):
                for k in range(8):
                    found = store.get("token_logps", [batch], [k])
                    np.testing.assert_array_equal(found, np.full(200 * (k + 1), batch))
            assert len(store) < 8 * (last + 3)


FULL_DISK = """
    import resource, signal, sys
    import numpy as np
    from paxo.logp_store import LogpStore
    store = LogpStore(sys.argv[1], "policy")
    store.put_many([("logps", [0], [0], -1.5)])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the file may not grow beyond 1000 bytes
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        store.put_many([("logps", [1], [1], -2.5), ("token_logps", [1], [1], np.zeros(500))])
    except OSError as error:
        print(error)
    print(len(store), store.get("logps", [1], [1]))
    store.put_many([("logps", [2], [2], -3.5)])
"""


def test_a_full_disk_is_one_line_and_the_file_stays_as_it_was(tmp_path):
    out, _ = python(FULL_DISK, tmp_path).communicate()
    message, state = out.splitlines()
    assert message.startswith("cannot write 2062 bytes to ")  # 33, and 29 with 500 floats
    assert message.endswith(
        "0.bin (File too large): make room and run the same command again; "
        "what was stored before is kept"
    )
    assert state == "1 None"
    assert (tmp_path / "0.bin").stat().st_size == 2 * 33
    with LogpStore(tmp_path, "policy") as store:
        assert store.get("logps", [0], [0]) == -1.5
        assert store.get("logps", [2], [2]) == -3.5
