"""Writers: what a line holds, what resuming removes, and what a terminal and a log file see."""

import io
import json
import logging
import pathlib
import re

import pytest

from paxo.training.writers import (
    JsonlWriter,
    LogWriter,
    MultiWriter,
    TensorBoardWriter,
    TerminalWriter,
    make_writer,
)


def write_steps(writer, steps):
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})


def test_a_line_holds_step_and_metrics_to_the_bit(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    loss = 0.1 + 0.2  # 0.30000000000000004
    writer.write(
        7, {"loss": loss, "rewards/chosen": -1e-30, "kl": float("nan"), "x": -float("inf")}
    )
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 7, "loss": loss, "rewards/chosen": -1e-30, "kl": None, "x": None}
    ]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 0.5}'])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
    whole = JsonlWriter(tmp_path / "whole.jsonl")
    write_steps(whole, range(1, 9))
    killed = JsonlWriter(tmp_path / "killed.jsonl")
    write_steps(killed, range(1, 6))
    with (tmp_path / "killed.jsonl").open("ab") as file:
        file.write(torn)  # by the kill: no line end
    resumed = JsonlWriter(tmp_path / "killed.jsonl")
    resumed.truncate_after(3)
    write_steps(resumed, range(4, 9))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "killed.jsonl"}


def test_the_line_of_a_round_that_is_not_behind_is_removed_though_its_step_is(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step, metrics in [
        (1, {"loss": 1.0}),
        (1, {"round": 1}),
        (2, {"loss": 0.5}),
        (2, {"round": 2}),
    ]:
        writer.write(step, metrics)
    writer.truncate_after(2, 1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "round": 1},
        {"step": 2, "loss": 0.5},
    ]


def test_a_full_disk_is_one_line_and_no_torn_line_stays(tmp_path, monkeypatch):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"loss": 1.0})

    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    writer._file = Full(writer._file)
    with pytest.raises(OSError, match=r"cannot write .*metrics.jsonl \(No space left.*make room"):
        writer.write(2, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/run/metrics.jsonl"):
        make_writer(tmp_path / "file" / "run", 3)


def test_tensorboard_hides_what_was_written_after_the_resumed_step(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    write_steps(first := TensorBoardWriter(tmp_path, purge_step=1), [1, 2, 3])
    first.close()
    write_steps(second := TensorBoardWriter(tmp_path, purge_step=3), [3, 4])
    second.close()
    events = [
        event for path in sorted(tmp_path.iterdir()) for event in read_events(path, event_pb2)
    ]
    scalars = [(e.step, e.summary.value[0].simple_value) for e in events if e.summary.value]
    assert sorted(step for step, _ in scalars) == [1, 2, 3, 3, 4]
    assert dict(scalars)[2] == 0.5
    assert {e.step for e in events if e.session_log.status == 1} == {1, 3}  # START: purge from here


def read_events(path, event_pb2):
    """The events of a TensorBoard file: records of length [8], CRC [4], data, CRC [4]."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_off_a_terminal_plain_lines_come_now_and_then_and_for_evaluations():
    stream = io.StringIO()
    writer = TerminalWriter(4, "dpo", stream=stream, seconds_between_lines=3600)
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": 0.5, "tokens_per_second": 12345.6, "grad_norm": 1.0})
        if step == 2:
            writer.write(step, {"eval/accuracy": 0.625})
    writer.close()
    first, evaluation, last = stream.getvalue().splitlines()
    assert first == "dpo 1/4  loss 0.5000  12,346 tokens/s"
    assert re.fullmatch(r"dpo 2/4  eval/accuracy 0.625  0:00:00 left", evaluation)
    assert last == "dpo 4/4  loss 0.5000  12,346 tokens/s"


def test_a_terminal_gets_a_bar_with_steps_loss_and_speed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    writer = TerminalWriter(4, "dpo", first_step=2, stream=stream)
    writer.write(3, {"loss": 0.25, "tokens_per_second": 1000.0})
    writer.write(3, {"eval/win_rate": 0.75})
    writer.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "3/4" in shown
    assert "loss 0.2500  1,000 tokens/s" in shown
    assert "dpo 3/4  eval/win_rate 0.75" in shown


def test_the_log_file_has_progress_and_what_the_loggers_say_without_doubling_it(tmp_path, caplog):
    logger = logging.getLogger("paxo")
    before = (logger.level, list(logger.handlers))
    writer = LogWriter(tmp_path / "log.txt", 10, "dpo")
    logging.getLogger("paxo.data.records").info("dropped 3 of 10 records")
    writer.write(1, {"loss": 0.5})
    writer.close()
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == [
        "INFO dropped 3 of 10 records",
        "INFO dpo 1/10  loss 0.5000",
    ]
    assert [record.getMessage() for record in caplog.records] == ["dropped 3 of 10 records"]
    assert (logger.level, logger.handlers) == before


def test_a_run_folder_gets_all_of_them_and_a_new_run_starts_afresh(tmp_path, capsys):
    for attempt in range(2):
        writer = make_writer(tmp_path, total_steps=2)
        writer.write(0, {"eval/win_rate": 0.5})
        write_steps(writer, [1, 2])
        writer.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2], attempt
    assert "train 2/2" in (tmp_path / "log.txt").read_text()
    assert "train 2/2  loss 0.5000" in capsys.readouterr().err
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writer = make_writer(tmp_path / "run", total_steps=2)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not pathlib.Path(tmp_path / "run").exists()


def test_every_writer_is_closed_even_when_one_fails():
    closed = []

    class Fails:
        def close(self):
            closed.append("fails")
            raise OSError("disk")

    class Fine:
        def close(self):
            closed.append("fine")

    with pytest.raises(OSError, match="disk"):
        MultiWriter([Fails(), Fine()]).close()
    assert closed == ["fails", "fine"]


def test_a_machine_that_has_only_the_bucket_goes_on_with_its_evaluations(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "bucket.txt").write_text(f"{tmp_path / 'bucket'}\n")

    def write(writer, *rounds):
        for number in rounds:
            writer.write(number, {"loss": 0.5})
            writer.write(number, {"round": number, "eval/win_rate": 1 / number})
        writer.close()

    def of_rounds(folder):
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(x["round"], x["eval/win_rate"]) for x in lines if "round" in x]

    write(make_writer(first, 9, resume_round=0), 1, 2, 3)
    # The checkpoint is older than the third round.
    write(make_writer(second, 9, 2, resume_round=2), 3, 4)
    assert of_rounds(second) == of_rounds(tmp_path / "bucket") == [(n, 1 / n) for n in range(1, 5)]
    assert "loss" not in (tmp_path / "bucket" / "metrics.jsonl").read_text()
