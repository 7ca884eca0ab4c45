"""Libraries that load when first used: importing the losses loads jax alone."""

from etils import epy

with epy.lazy_imports():
    import chex

__all__ = ["chex"]
