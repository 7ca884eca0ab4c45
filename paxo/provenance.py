"""The run folder: what was run, with which settings, by which versions, on which machine.

    <workdir>/experiment.py     the experiment file as it was at the first run
    <workdir>/config.json       resolved settings, `overrides.flatten`; written last, so that its
                                presence says that the other three are whole
    <workdir>/overrides.json    the flags given
    <workdir>/environment.json  versions, git commit, devices, environment variables

The same command run again finds equal settings and resumes. Where another file differs by then (an
edited experiment file, a new jax), the first stays, the new one is kept as `experiment-2.py`, and
the log says so.
"""

import contextlib
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paxo.overrides import SettingsError, flatten, to_json

logger = logging.getLogger(__name__)

PACKAGES = (
    *("paxo", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy"),
    *("grain", "safetensors", "libtpu"),
)
# Variables that change results, speed or memory. Tokens and keys have no place here.
VARIABLES = (
    "GLIBC_TUNABLES",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DEBUG_NANS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_ENABLE_PREEMPTION_SERVICE",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
    "JAX_PLATFORMS",
    "LIBTPU_INIT_ARGS",
    "TFDS_DATA_DIR",
    "TPU_MIN_LOG_LEVEL",
    "TPU_STDERR_LOG_LEVEL",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)
MAX_DIFFERENCES = 5


def write_run_folder(
    workdir: str | os.PathLike[str],
    experiment_file: str | os.PathLike[str],
    settings: Any,
    overrides: Sequence[str],
) -> bool:
    """Creates the run folder, or checks that the one there belongs to the same settings.

    On several processes, for process 0 only.

    Returns:
        Whether the folder already held a run with these settings, so that it is resumed.

    Raises:
        SettingsError: where the folder holds a run with other settings.
        OSError: where the folder cannot be written, with nothing half-written left in it.
    """
    folder, config = pathlib.Path(workdir), to_json(settings)
    resumes = _holds_run(folder, flatten(settings))
    texts = {
        "experiment.py": pathlib.Path(experiment_file).read_text(encoding="utf-8"),
        "overrides.json": _json(list(overrides)),
        "environment.json": _json(environment(experiment_file)),
        "config.json": config,
    }
    with _naming_the_way_out(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            if resumes:
                _keep_both(folder / name, text)
            else:
                write_text(folder / name, text)
    return resumes


def forget_unless_begun(workdir: str | os.PathLike[str]) -> None:
    """Makes the folder free for other settings again if the run in it failed before its first step.

    Else who mistyped a path would be told, with the right one, that another run lies there.
    """
    folder = pathlib.Path(workdir)
    begun = [path for path in folder.rglob("metrics.jsonl") if path.stat().st_size]
    begun += folder.rglob("checkpoints/*")
    if not begun:
        (folder / "config.json").unlink(missing_ok=True)


def environment(experiment_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Versions, git commit of the experiment file, devices and variables; starts jax's backend."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "git": git_state(pathlib.Path(experiment_file).resolve().parent),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def git_state(folder: pathlib.Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder`, and whether files differ; None outside of one."""
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", os.fspath(folder), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, no repository, or no commit in it
        return None
    return {"commit": commit.strip(), "dirty": bool(status.strip())}


@contextlib.contextmanager
def log_to(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Copies what the package logs to `<workdir>/log.txt` inside the `with` block.

    Of several processes only process 0 writes.
    """
    import jax

    if jax.process_index() != 0:
        yield
        return
    handler = logging.FileHandler(pathlib.Path(workdir, "log.txt"), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("paxo")
    level = package.level
    package.addHandler(handler)
    package.setLevel(level or logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a whole file or nothing: a reader never sees part of it, nor does a later run."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _holds_run(folder: pathlib.Path, settings: dict[str, Any]) -> bool:
    """Whether a run with these settings lies there; refuses one with others."""
    path = folder / "config.json"
    if not path.exists():
        if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
            raise SettingsError(
                f"{folder} holds checkpoints but no config.json to tell which settings they belong "
                "to; choose another --workdir or delete the folder"
            )
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(
            f"{path} is not readable JSON ({error}); choose another --workdir or delete the folder"
        ) from None
    differences = _differences(before, settings)
    if differences:
        more = len(differences) - MAX_DIFFERENCES
        raise SettingsError(
            f"{folder} holds a run with other settings: {'; '.join(differences[:MAX_DIFFERENCES])}"
            f"{f'; and {more} more' if more > 0 else ''}. Choose another --workdir for a new run, "
            "or give the same settings to resume this one"
        )
    return True


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`name: old, now new` for each setting that differs, as JSON: 1 and 1.0 and true differ."""
    lines = []
    for name in dict.fromkeys([*before, *after]):
        old, new = (
            json.dumps(values[name], sort_keys=True) if name in values else "not there"
            for values in (before, after)
        )
        if old != new:
            lines.append(f"{name} was {old}, now {new}")
    return lines


def _keep_both(path: pathlib.Path, text: str) -> None:
    """Leaves a file as it is, and writes a text that differs from its latest version beside it."""
    latest = path
    for number in itertools.count(2):
        beside = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if not beside.exists():
            break
        latest = beside
    if not latest.exists() or latest.read_text(encoding="utf-8") != text:
        target = beside if path.exists() else path
        logger.warning("%s differs from that of this run so far: kept as %s", path.name, target)
        write_text(target, text)


@contextlib.contextmanager
def _naming_the_way_out(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        way_out = "free some space" if error.errno == errno.ENOSPC else "choose another --workdir"
        reason = error.strerror or str(error)
        message = f"cannot write to the run folder: {reason}; {way_out}"
        raise OSError(error.errno, message, os.fspath(folder)) from error


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    # A checkout on the path is not an installed package, but it has a version.
    return versions | {"paxo": sys.modules["paxo"].__version__}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
