"""Figures of methods against iterations: as a picture, and as one table for `results.json`."""

import itertools
import os
from collections.abc import Mapping

from paxo.rows import written_by_first

# title -> method -> iteration -> figure
Tables = Mapping[str, Mapping[str, Mapping[int, float]]]
STYLES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)), ":")  # lines that lie on one another stay apart
FEW = 40  # points that are marked one by one


def by_method(tables: Tables) -> dict[str, dict[int, float]]:
    """Method -> iteration -> figure, the title of its table beside a method's name.

    >>> by_method({"beta 0.1": {"egpo": {0: 0.5}}, "beta 1": {"egpo": {0: 0.25}}})
    {'egpo, beta 0.1': {0: 0.5}, 'egpo, beta 1': {0: 0.25}}
    """
    return {
        f"{method}, {title}": dict(points)
        for title, methods in tables.items()
        for method, points in methods.items()
    }


@written_by_first
def plot_tables(
    path: str | os.PathLike[str],
    tables: Tables,
    *,
    xlabel: str = "iteration",
    ylabel: str = "mean duality gap",
    log_y: bool = True,
    floor: float = 1e-14,
) -> None:
    """Draws one panel a table, one line a method; the same figures give the same bytes.

    Args:
        path: of the picture.
        tables: title -> method -> iteration -> figure.
        xlabel: what is counted.
        ylabel: what the figures are.
        log_y: logarithmic figures; smaller ones than `floor` are drawn there.
        floor: see `log_y`.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(5 * len(tables), 4), layout="constrained")
    for axes, (title, methods) in zip(
        figure.subplots(1, len(tables), squeeze=False)[0], tables.items()
    ):
        for (name, points), style in zip(methods.items(), itertools.cycle(STYLES)):
            values = [max(v, floor) if log_y else v for v in points.values()]
            marker = "." if len(points) <= FEW else ""
            at = [int(t) for t in points]
            axes.plot(at, values, linestyle=style, label=name, marker=marker, markersize=3)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_yscale("log" if log_y else "linear")
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
