"""Optional packages, imported at first use."""

import importlib
import types


def require(module: str, extra: str) -> types.ModuleType:
    """Imports an optional package; the `ImportError` names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is installed, one of its own dependencies is not
        raise ImportError(
            f"{module!r} is needed and not installed: pip install 'datarax-reference[{extra}]'"
        ) from error
