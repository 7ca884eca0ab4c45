"""Who may import whom, read from the import statements: the rows of paxo/README.md."""

import ast
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent

# A module imports from rows above its own, and from its own group within a row.
ROWS = (
    ({"types", "numerics", "rows", "lazy"},),
    ({"losses"},),
    ({"objectives", "metrics"}, {"models"}, {"data"}, {"judges"}),
    (
        {
            *("scoring", "logp_store", "chunked_head", "vocabulary_head", "head_outputs"),
            "reward_scoring",
        },
        {"sampling"},
        {"games"},
    ),
    ({"training"},),
    ({"evaluation"}, {"online"}),
    (
        {
            *("experiment", "loading", "frozen", "runs", "artifacts", "plan", "cli", "rounds"),
            *("prompts", "round_evaluation"),
            *("overrides", "provenance", "distributed", "clusters"),
        },
    ),
)
# Not even from the rows above: these take models, data and judges as arguments.
BARRED = {
    "losses": {"types.PreferenceBatch", "types.Policy"},
    "training": {"models", "data", "judges", "sampling", "games"},
    "evaluation": {"models", "data", "judges"},
    "online": {"models", "data", "judges"},
}
# Libraries that stay on one side of a border; torch and TensorFlow stay outside.
LIBRARIES = {
    "flax": {"models"},
    "optax": {"training", "experiment"},
    "orbax": {"training", "models", "experiment"},
    "torch": set(),
    "tensorflow": set(),
}
PLACE = {
    name: (row, group)
    for row, groups in enumerate(ROWS)
    for group, names in enumerate(groups)
    for name in names
}


def imports(path: pathlib.Path, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, at any depth, for types only too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def violations(root: pathlib.Path) -> list[str]:
    """`file:line imports x` for each import under `root/paxo` that the rows forbid."""
    found = []
    for path in sorted((root / "paxo").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        for line, name in imports(path, parts[:-1]):
            if reason := fault(parts[1], name):
                found.append(f"{path.relative_to(root)}:{line} imports {name}: {reason}")
    return found


def fault(importer: str, name: str) -> str | None:
    """Why the top-level module `importer` may not import `name`; None if it may."""
    first, _, rest = name.partition(".")
    if first in LIBRARIES and importer not in LIBRARIES[first]:
        return f"{first} belongs to {sorted(LIBRARIES[first]) or 'no module'}"
    if first != "paxo" or name == "paxo.__version__":
        return None
    if importer == "__init__":
        return "the package itself loads everything on first use"
    if not rest:
        return None if importer == "cli" else "import the module that defines the name"
    imported = rest.split(".")[0]
    for module in (importer, imported):
        if module not in PLACE:
            return f"{module!r} stands in no row; a public name comes from its own module"
    barred = BARRED.get(importer, set())
    if any(rest == entry or rest.startswith(entry + ".") for entry in barred):
        return f"{importer} knows nothing of {imported}"
    (row, group), (other_row, other_group) = PLACE[importer], PLACE[imported]
    if other_row > row:
        return f"{imported} stands in row {other_row}, below {importer} in row {row}"
    if other_row == row and other_group != group:
        return f"{importer} and {imported} know nothing of one another"
    return None


def test_every_module_imports_only_from_rows_above_its_own():
    assert violations(PROJECT) == []


@pytest.mark.parametrize(
    ("file", "statement", "reason"),
    [
        ("losses/pairwise.py", "from paxo.scoring import token_logps", "row 3, below losses"),
        ("losses/pairwise.py", "from paxo.types import PreferenceBatch", "knows nothing of types"),
        ("data/packing.py", "import paxo.models.config", "know nothing of one another"),
        ("data/packing.py", "from paxo import models", "know nothing of one another"),
        ("data/packing.py", "from ..judges import rules", "know nothing of one another"),
        ("sampling.py", "from paxo.scoring import make_scorer", "know nothing of one another"),
        ("training/loop.py", "from paxo.data import batching", "training knows nothing of data"),
        ("training/loop.py", "from paxo.models import policy", "training knows nothing of models"),
        ("training/step.py", "def f():\n    from paxo import experiment", "row 6, below training"),
        ("evaluation/heldout.py", "from paxo.models import policy", "knows nothing of models"),
        (
            "judges/rules.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from paxo.data import records",
            "know nothing of one another",
        ),
        ("games/updates.py", "from paxo.online import method", "row 5, below games in row 3"),
        ("games/solve.py", "from paxo.training import step", "row 4, below games in row 3"),
        ("scoring.py", "import paxo", "import the module that defines the name"),
        ("scoring.py", "from paxo import PreferenceBatch", "a public name comes from its own"),
        ("novelty.py", "from paxo import types", "'novelty' stands in no row"),
        ("training/step.py", "from flax import nnx", "flax belongs to ['models']"),
        ("models/pretrained.py", "import torch", "torch belongs to no module"),
        ("__init__.py", "from paxo.types import Policy", "loads everything on first use"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, statement, reason):
    path = tmp_path / "paxo" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(statement + "\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"paxo/{file}:")
    assert reason in found


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("losses/pairwise.py", "from paxo.numerics import masked\nfrom . import contract"),
        ("losses/pairwise.py", "from paxo.types import Array"),
        ("objectives.py", "from paxo.losses import pairwise\nfrom paxo.metrics import margins"),
        ("models/policy.py", "from flax import nnx\nfrom paxo.types import Policy"),
        ("logp_store.py", "from paxo.scoring import make_scorer"),
        ("training/step.py", "from paxo import metrics, objectives\nfrom paxo.scoring import x"),
        ("experiment.py", "from paxo.data import packing\nfrom paxo import provenance, models"),
        ("cli.py", "import paxo\nfrom paxo import experiment"),
    ],
)
def test_a_permitted_import_is_not_found(tmp_path, file, statement):
    path = tmp_path / "paxo" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(statement + "\n")
    assert violations(tmp_path) == []


def test_importing_any_module_starts_no_backend_and_changes_no_environment_variable():
    script = """
import importlib, os, pathlib, sys
root = pathlib.Path(sys.argv[1])
import jax, transformers, tensorflow_datasets, orbax.checkpoint, grain  # they do as they like
before = dict(os.environ)
for path in sorted((root / "paxo").rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(name)
assert dict(os.environ) == before
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, str(PROJECT)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        # A backend that starts finds no such platform and raises.
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


def test_the_losses_load_little_beside_jax():
    script = """
import sys
import jax, jax.numpy
before = set(sys.modules)
import paxo.losses
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    allowed = {"paxo", "jax", "jaxlib", "etils"} | sys.stdlib_module_names
    assert set(loaded.stdout.split()) - allowed == set()


def test_paxo_alone_loads_neither_jax_nor_numpy():
    script = "import sys, paxo\nprint(*sys.modules.keys() & {'jax', 'numpy', 'flax', 'optax'})"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT, check=True
    )
    assert loaded.stdout.split() == []
