"""Figures for people: a table, a plot, a file."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paxo.rows import written_by_first


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints rows under their columns; the first column names them."""
    import rich
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        # As Text: in a string, "[a]" would be a mark-up of rich's.
        table.add_row(*(Text(x if isinstance(x, str) else f"{x:.3f}") for x in row))
    rich.get_console().print(table)


@written_by_first
def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes `results` as JSON, whole or not at all; of several processes the first one does."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@written_by_first
def plot_reward_kl(
    path: str | os.PathLike[str],
    steps: Sequence[int],
    kls: Sequence[float],
    rewards: Sequence[float],
) -> None:
    """Draws true reward against sequence KL (nats) over training, the frontier of the DPO paper."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(kls, rewards, color="0.7", zorder=1)
    points = axes.scatter(kls, rewards, c=np.asarray(steps), cmap="viridis", zorder=2)
    axes.set_xlabel("sequence KL to the reference (nats)")
    axes.set_ylabel("mean true reward")
    axes.grid(alpha=0.3)
    figure.colorbar(points, label="step")
    # Without the date and version in the file, the same points give the same bytes.
    figure.savefig(path, dpi=120, metadata={"Software": None})
