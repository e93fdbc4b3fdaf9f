"""Packages that are imported when they are used."""

import importlib
import types


def require(module: str, extra: str) -> types.ModuleType:
    """An optional package, or an `ImportError` that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{module!r} is needed and not installed: pip install 'datarax-reference[{extra}]'"
        ) from error
