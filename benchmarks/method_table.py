"""Writes the table of methods into README.md: name, paper, inputs, and the figure of each.

    PAXO_FIGURES=benchmarks/methods.json python -m pytest -n 2 --dist=load -m slow tests/methods
    python -m benchmarks.method_table

The figures are those of the training test, which trains every method on the quickstart's task.
"""

import json
import pathlib
import re

from paxo.objectives import LOSSES, method_table, objective

ROOT = pathlib.Path(__file__).resolve().parent.parent
FIGURES = ROOT / "benchmarks" / "methods.json"
BEGIN, END = "<!-- methods: python -m benchmarks.method_table -->", "<!-- end of methods -->"
# Title -> the files of `paxo.losses` that hold its losses.
FAMILIES = {
    "Pairs with a reference": (
        *("pairwise", "noisy", "links", "margins", "imitation", "divergence", "anchored"),
        *("length", "batchwise", "multi", "uncertain"),
    ),
    "Without a reference": (
        *("reference_free", "rationale", "triple", "comparisons", "calibration"),
    ),
    "Token by token": ("tokenwise",),
    "One completion at a time": ("pointwise",),
    "Lists": (
        *("listwise", "lipo", "learning_to_rank", "gumbel", "contrastive", "soft_ranking", "tree"),
    ),
    "Games and self-play": ("nash", "selfplay", "magnetic", "exploration"),
    "Rewards: policy gradient and regression": (
        *("policy_gradient", "group_relative", "regression", "soft_bellman", "posterior"),
        *("constrained", "mixture_of_judges"),
    ),
    "Reward and preference models": ("reward", "steps"),
    "Likelihood": ("likelihood",),
    "Written as logic": ("semantic",),
}
USUAL = ("policy_logps", "reference_logps", "lengths")
ARXIV = re.compile(r"(.*?), arXiv:(\d{4}\.\d{4,5})(.*)")


def families() -> dict[str, list[str]]:
    """Title -> names, in the order of `LOSSES`."""
    home = {file: title for title, files in FAMILIES.items() for file in files}
    found = {title: [] for title in FAMILIES}
    for name, loss in LOSSES.items():
        title = home[loss.__module__.rpartition(".")[2]]
        if title == "Pairs with a reference" and not objective(name).frozen_roles:
            title = "Without a reference"
        found[title].append(name)
    return found


def table(figures: dict[str, dict]) -> str:
    """The text between the marks: a folded table for each family."""
    rows = {row["name"]: row for row in method_table()}
    parts = []
    for family, names in families().items():
        lines = [
            f"<details><summary><b>{family}</b>: {', '.join(names)}</summary>",
            "",
            "| objective | paper | also takes | trained |",
            "|---|---|---|---|",
            *(_line(rows[name], figures.get(name)) for name in names),
            "",
            "</details>",
        ]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def written(readme: str, figures: dict[str, dict]) -> str:
    """README's text with the table of today."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(figures)}\n{END}{after}"


def _line(row: dict, figure: dict | None) -> str:
    match = ARXIV.match(row["paper"])
    paper = f"[{row['paper'].removeprefix('https://')}]({row['paper']})"
    if match:
        who, number, _ = match.groups()
        paper = f"{who}, [{number}](https://arxiv.org/abs/{number})"
    others = ", ".join(f"`{name}`" for name in row["inputs"] if name not in USUAL)
    return f"| `{row['name']}` | {paper} | {others} | {_trained(figure)} |"


def _trained(figure: dict | None) -> str:
    if figure is None:
        return ""
    if figure["promise"] == "reward":
        return f"{figure['before']:.3f} → {figure['after']:.3f}"
    return f"{figure['after']:.0%} right"


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    figures = json.loads(FIGURES.read_text())
    readme.write_text(written(readme.read_text(), figures))


if __name__ == "__main__":
    main()
