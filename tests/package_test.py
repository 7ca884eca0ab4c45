"""The package as a user meets it: `import paxo`, its public names, what it installs."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest

import paxo

PROJECT = pathlib.Path(__file__).resolve().parent.parent
SETUP = PROJECT / "setup.py"

pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="needs the project's checkout")


@pytest.fixture(scope="module")
def metadata() -> dict:
    """What setup.py hands to setuptools, which need not be installed here."""
    caught: dict = {}
    fake = types.ModuleType("setuptools")
    fake.setup = lambda **arguments: caught.update(arguments)
    fake.find_packages = lambda include: include
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(SETUP))
    return caught


@pytest.mark.parametrize("name", paxo.__all__)
def test_public_name_resolves(name):
    value = getattr(paxo, name)
    if isinstance(value, types.ModuleType):  # a folder without __init__.py has no file
        assert value.__file__


def test_public_names_are_sorted_in_the_source_and_listed_by_dir():
    assert list(paxo._PUBLIC) == sorted(paxo._PUBLIC)
    assert set(paxo._PUBLIC) <= set(dir(paxo))


def test_an_unknown_public_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match="'make_train_stp'; did you mean 'make_train_step'"):
        _ = paxo.make_train_stp


def test_import_paxo_loads_no_third_party_package_and_takes_less_than_a_tenth_of_a_second():
    script = """
import sys, time
start = time.perf_counter()
import paxo
seconds = time.perf_counter() - start
heavy = {"jax", "numpy", "flax", "transformers", "rich", "orbax"} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT
        )
        for _ in range(3)
    ]
    assert min(float(finished.stdout) for finished in runs) < 0.1


def test_setup_reads_the_version_from_the_package(metadata):
    assert metadata["version"] == paxo.__version__


def test_requirements_are_lower_bounds_so_that_jax_and_flax_move_together(metadata):
    for requirement in metadata["install_requires"]:
        bounds = re.findall(r"[<>=!~]+", requirement.partition(";")[0])
        assert set(bounds) <= {">="}, requirement


def test_each_imported_package_is_required(metadata):
    required = {_name(requirement) for requirement in metadata["install_requires"]}
    distributions = importlib.metadata.packages_distributions()
    imported = {
        _name(distributions[module][0])
        for path in (PROJECT / "paxo").rglob("*.py")
        for module in _top_level_imports(path)
        if module in distributions and module != "paxo"
    }
    optional = {_name(entry) for entry in metadata["extras_require"]["hub"]}
    assert imported - optional <= required


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in (PROJECT / "paxo").rglob("*.py")}
    assert [
        str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()
    ] == []


def test_the_console_script_is_there(metadata):
    (script,) = metadata["entry_points"]["console_scripts"]
    module, _, function = script.partition("=")[2].strip().partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def _name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")


def _top_level_imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names)
