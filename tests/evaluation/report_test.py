"""The table, the plot and the results file."""

import errno
import json
import pathlib

import jax
import pytest
import rich.console

from paxo.evaluation import report
from paxo.evaluation.self_play import plot_rounds
from paxo.games.plots import plot_tables


def printed(monkeypatch, *arguments):
    console = rich.console.Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    monkeypatch.setattr(rich, "get_console", lambda: console)
    report.print_table(*arguments)
    return console.export_text()


def test_the_table_shows_title_columns_texts_and_numbers_of_three_digits(monkeypatch):
    rows = [("win rate", 0.5, 0.98765), ("  interval", "[0.4, 0.6]", "[0.9, 1.0]")]
    lines = printed(monkeypatch, "100 prompts", ("", "SFT", "DPO"), rows).splitlines()
    assert lines[0].strip() == "100 prompts"
    cells = [[cell.strip() for cell in line.strip("┃│").split("│")] for line in lines[4:6]]
    assert cells == [["win rate", "0.500", "0.988"], ["interval", "[0.4, 0.6]", "[0.9, 1.0]"]]
    assert [word for word in ("SFT", "DPO") if word in lines[2]] == ["SFT", "DPO"]


def test_square_brackets_in_a_table_are_text_and_no_markup(monkeypatch):
    text = printed(monkeypatch, "t", ("", "interval"), [("a", "[bold]")])
    assert "[bold]" in text


def test_results_are_read_back_as_they_were(tmp_path):
    results = {"win_rate": {"before": 0.5, "after": 0.1 + 0.2}, "seconds": 1.5}
    report.write_results(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_keeps_the_earlier_results_and_leaves_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    report.write_results(file, {"a": 1})

    def full(self, text, **_):
        with self.open("w") as half:
            half.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_results(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_figure_that_is_no_number_is_an_error_and_not_a_file_that_others_cannot_read(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write_results(tmp_path / "results.json", {"kl": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_the_same_points_give_the_same_picture_to_the_byte(tmp_path):
    pytest.importorskip("matplotlib")
    points = ([0, 20, 40], [0.0, 1.5, 4.0], [0.1, 0.5, 0.8])
    for name in ("a.png", "b.png"):
        report.plot_reward_kl(tmp_path / name, *points)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert first.startswith(b"\x89PNG")
    report.plot_reward_kl(tmp_path / "c.png", points[0], points[1], [0.1, 0.5, 0.7])
    assert (tmp_path / "c.png").read_bytes() != first


def test_of_several_processes_only_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    for process, wanted in ((1, []), (0, ["results.json"])):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        report.write_results(tmp_path / "results.json", {})
        assert [path.name for path in tmp_path.iterdir()] == wanted
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    (tmp_path / "results.json").unlink()
    report.plot_reward_kl(tmp_path / "a.png", [0], [0.0], [0.0])
    plot_rounds(tmp_path / "b.png", [{"round": 1, "tokens": 2.0}])
    plot_tables(tmp_path / "c.png", {"game": {"egpo": {0: 0.5}}})
    assert list(tmp_path.iterdir()) == []


def test_a_process_alone_writes_without_a_backend(tmp_path, monkeypatch):
    def starts_a_backend():
        raise AssertionError("jax.process_index() starts one")

    monkeypatch.setattr(jax, "process_index", starts_a_backend)
    report.write_results(tmp_path / "plan.json", {})
    assert (tmp_path / "plan.json").exists()
