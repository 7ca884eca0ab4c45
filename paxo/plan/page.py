"""A plan as a page: tables on a terminal, and the same as Markdown."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from paxo.evaluation.report import write_results
from paxo.models.sharding import MESH_AXES
from paxo.plan.chips import GIB
from paxo.plan.estimate import SPARE


class Table(NamedTuple):
    """A titled table; the first column names its rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def write_plan(made: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes plan.json and plan.md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "plan.json", made)
    (folder / "plan.md").write_text(markdown(made), encoding="utf-8")


def print_plan(made: Mapping[str, Any]) -> None:
    """Prints a plan on standard output."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    for table in tables(made):
        shown = RichTable(title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    for line in verdict(made):
        console.print(Text(line), soft_wrap=True)


def markdown(made: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    parts = [f"# {made['model']['name']} on {made['topology']['name']}", *verdict(made)]
    for table in tables(made):
        head = _line(table.columns) + "\n" + _line(["---", *["---:"] * (len(table.columns) - 1)])
        parts += [f"## {table.title}", "\n".join([head, *map(_line, table.rows)])]
    return "\n\n".join(parts) + "\n"


def verdict(made: Mapping[str, Any]) -> list[str]:
    """Whether it fits, what it takes, and what the figures rest on; one sentence a line."""
    topology, time, cost = made["topology"], made["time"], made["round"]
    fits = "fits" if made["fits"] else "does not fit"
    chips = f"{topology['chips']} chip{'s' if topology['chips'] > 1 else ''}"
    lines = [
        f"{made['model']['name']} {fits} {topology['name']} ({chips}): {_spare(made['spare'])} of "
        f"{_bytes(topology['hbm_bytes'])} a device; at least {SPARE:.0%} shall be.",
        f"{_work(made)} take at least {_duration(time['run_seconds'])}, that is "
        f"{time['chip_hours']:,.1f} chip-hours.",
        f"Memory by category and times are analytic, times are bounds. {made['compiled_because']}.",
    ]
    if "smallest" in made:
        kind, small = made["smallest"]["of"], made["smallest"]["too_small"]
        too_small = f" Compiled and found too small: {', '.join(small)}." if small else ""
        lines.insert(1, f"It is the smallest slice of {kind} that holds the run.{too_small}")
    if cost["left_out"]:
        lines.append(f"{cost['left_out']}.")
    if second := made["memory"]["second_state"]:
        lines.append(
            f"The half step of a round keeps the state that it starts from: {_bytes(second)} more "
            "than a step."
        )
    if cost["number"] and cost["drawn"] >= 2 * cost["prompts"]:
        lines.append(
            f"A sampler draws for {cost['drawn']} prompts a round, of which {cost['prompts']} are "
            "asked: each process fills a batch of its own; a smaller sample_batch draws fewer."
        )
    failed = [p["failure"] for p in made["compiled"].values() if p["failure"]]
    return lines + [f"The compiler says: {failure}." for failure in failed]


def _work(made: Mapping[str, Any]) -> str:
    """What the run does, counted."""
    cost, steps = made["round"], made["time"]["steps"]
    if not cost["number"]:
        return f"{steps} steps"
    each = cost["steps"]
    of = f" of {each} step{'s' if each > 1 else ''}" if each * cost["number"] == steps else ""
    twice = ", each step taken twice," if each * cost["number"] == 2 * steps else ""
    return f"{cost['number']} rounds{of}{twice}"


def tables(made: Mapping[str, Any]) -> list[Table]:
    """All tables of the page."""
    found = [_run(made), _memory(made), _programs(made), _times(made), _network(made)]
    found += [_received(made), _round(made), _search(made)]
    return [table for table in found if table.rows]


def _run(made: Mapping[str, Any]) -> Table:
    model, layout, assumed = made["model"], made["layout"], made["assumptions"]
    rows = [
        ("parameters", f"{model['parameters']:,}"),
        ("trained", f"{model['trained']:,}"),
        ("objective", made["objective"]),
        ("mesh", _mesh(layout)),
        *_reference_mesh(made),
        ("rows a step", f"{layout['rows']} × {layout['row_length']} tokens"),
        ("microbatches", str(layout["microbatches"])),
        ("remat", layout["remat"]),
        ("dtypes", f"{model['shape']['param_dtype']}, computed in "
                   f"{model['shape']['compute_dtype']}"),
        ("assumed prompt, mean and longest",
         f"{assumed['prompt']:.0f}, {assumed['max_prompt']} tokens"),
        ("assumed completion, mean and longest",
         f"{assumed['completion']:.0f}, {assumed['max_completion']} tokens"),
        ("candidates of a group", str(assumed["candidates"])),
        ("groups a row", f"{assumed['groups_per_row']:.1f}"),
    ]  # fmt: skip
    if anchors := made["memory"]["anchors"]:
        rows.append(("copies of the trained weights beside the state", ", ".join(anchors)))
    return Table("the run", ("", ""), rows)


def _reference_mesh(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line for each frozen policy that lies differently from the run."""
    return [(f"mesh of the {role}", _mesh(sizes)) for role, sizes in made["meshes"].items()]


def _mesh(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {sizes[axis]}" for axis in MESH_AXES)


def _memory(made: Mapping[str, Any]) -> Table:
    memory = made["memory"]
    rows = [(name, _bytes(size)) for name, size in memory["bytes"].items() if size]
    rows += [
        ("training, estimated", _bytes(memory["peak"])),
        ("sampling, estimated", _bytes(memory["sampling_peak"])),
        ("a device has", _bytes(made["topology"]["hbm_bytes"])),
    ]
    return Table("memory of a device, estimated", ("", ""), rows)


def _programs(made: Mapping[str, Any]) -> Table:
    hbm = made["topology"]["hbm_bytes"]
    rows = []
    for name, program in made["compiled"].items():
        parts = ("arguments", "temporaries", "outputs", "beside", "peak")
        sizes = [_bytes(program[part]) for part in parts]
        spare = f"{1 - program['peak'] / hbm:.0%}"
        rows.append((name, *sizes, spare, f"{program['seconds']:.0f}"))
    columns = ("", "inputs", "within", "outputs", "beside", "peak", "spare", "seconds")
    return Table("memory of a device, by the compiler", columns, rows)


def _times(made: Mapping[str, Any]) -> Table:
    time, flops = made["time"], made["flops"]
    step = time["step"]
    rows = [
        ("operations of a step", f"{flops['step']:.3e}"),
        ("  that it cannot do without", f"{flops['useful']:.3e}"),
        ("step, products", _seconds(step["compute"])),
        ("step, memory traffic", _seconds(step["memory"])),
        ("step, network", _seconds(step["network"])),
        ("step, with scoring", _seconds(time["scored_step"])),
        ("MFU, at most", f"{time['mfu_bound']:.0%}"),
        ("tokens a second, at most", f"{time['tokens_per_second']:,.0f}"),
    ]
    return Table(f"least times; a step is bound by {time['limited_by']}", ("", ""), rows)


def _network(made: Mapping[str, Any]) -> Table:
    sent = made["collective_bytes"]
    rows = [
        (axis, *(_bytes(sent[program][axis]) for program in sent))
        for axis in sent["step"]
        if any(bytes_of[axis] for bytes_of in sent.values())
    ]
    columns = ("", *sent)
    return Table("received by a device over each mesh axis, estimated", columns, rows)


def _received(made: Mapping[str, Any]) -> Table:
    programs = {name: p["received"] for name, p in made["compiled"].items() if p["received"]}
    axes = dict.fromkeys(axis for received in programs.values() for axis in received)
    rows = [(axis, *(_bytes(p.get(axis, 0.0)) for p in programs.values())) for axis in axes]
    return Table("the same, by the compiled programs", ("", *programs), rows)


def _round(made: Mapping[str, Any]) -> Table:
    cost = made["round"]
    names = {
        "sampling": "drawing candidates" if cost["number"] else "sampling",
        "opponents": "drawing opponents",
        "scoring": "scoring",
        "step": f"{cost['steps']} steps" if cost["steps"] > 1 else "step",
        "seconds": "whole round",
    }
    shown = [name for name in names if cost[name] or name != "opponents"]
    rows = [(names[name], _seconds(cost[name])) for name in shown]
    rows.append(("chip-hours", f"{cost['chip_hours']:.3f}"))
    if best := cost["fastest_sampling"]:
        rows.append((f"sampling on {_mesh(best['mesh'])}", _seconds(best["seconds"])))
    against = f" against {cost['against']}" if cost["against"] else ""
    title = (
        f"an online round of {cost['prompts']} prompts × {cost['candidates']}{against}, at least"
    )
    return Table(title, ("", ""), rows)


def _search(made: Mapping[str, Any]) -> Table:
    rows, plays = [], made["round"]["number"] > 0
    for number, found in enumerate(made["search"], 1):
        by = "compiled" if found["compiled"] else "estimated"
        rows.append((
            f"{number}. {found['layout']['flags']}",
            _seconds(found["round_seconds" if plays else "scored_step"]),
            f"{found['mfu_bound']:.0%}",
            f"{found['spare']:.0%} {by}",
        ))  # fmt: skip
    columns = ("--set", "round" if plays else "step with scoring", "MFU", "spare")
    return Table(
        f"fastest layouts of as many {'groups' if plays else 'tokens'} a step", columns, rows
    )


def _spare(share: float) -> str:
    return f"{share:.0%} is left" if share >= 0 else f"{-share:.0%} too much"


def _bytes(size: float) -> str:
    """Bytes in a unit in which they have digits."""
    for unit, least in (("GiB", GIB), ("MiB", 2**20)):
        if size >= least / 10:
            return f"{size / least:.2f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def _seconds(number: float) -> str:
    return f"{number * 1e3:.3g} ms" if number < 1 else f"{number:.3g} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return _seconds(seconds)
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
