"""Shared fixtures; eight CPU devices, so that meshes are tested on every machine."""

import os
import pathlib

# Most of the suite's time is compilation, and most programs are small: each is compiled once, for
# all workers, for the processes that tests start, and for the next run.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parent.parent / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

PROJECT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data sets: `PAXO_DATA`, or `../shared/data` beside the project."""
    folder = pathlib.Path(os.environ.get("PAXO_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set PAXO_DATA to the folder of data sets")
    return folder
