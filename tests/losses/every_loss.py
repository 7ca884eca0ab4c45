"""Every loss of the package by name, registered or not."""

import importlib
import inspect
import pkgutil

import paxo.losses


def every_loss():
    """Name without `_loss` -> function, of all modules of `paxo.losses`."""
    found = {}
    for module in pkgutil.iter_modules(paxo.losses.__path__):
        inside = vars(importlib.import_module(f"paxo.losses.{module.name}"))
        for name, value in inside.items():
            if name.endswith("_loss") and not name.startswith("_") and inspect.isfunction(value):
                found[name.removesuffix("_loss")] = value
    return found


LOSSES = every_loss()
