"""Counting what XLA compiles, and compiling quickly."""

import contextlib

import jax
import pytest

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_counters = []


class Compilations:
    """Number of programs compiled (or fetched from the cache on disk) so far."""

    def __init__(self):
        self.count = 0


def _listen(event, duration, **kwargs):
    if event == _BACKEND_COMPILE:
        for counter in _counters:
            counter.count += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations():
    """Counts the programs that are compiled inside: `with compilations() as compiled: ...`."""
    counter = Compilations()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@pytest.fixture(scope="module")
def quick_compiles():
    """Skips XLA's costly optimisations: programs of made models then compile four times faster.

    They are forgotten at the end: jax would take them for optimised ones.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
