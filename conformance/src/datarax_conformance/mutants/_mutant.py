"""A mutant: edits of the model's source, and the engine that results."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Sequence

from .. import library, library_sources, model, model_adapter

OWN_IMPORT = re.compile(r"^ *from \.\w* import (\([^)]*\)|[^\n]*)\n", re.MULTILINE)


@functools.cache
def model_source() -> str:
    return inspect.getsource(model)


@functools.cache
def library_source() -> str:
    """The source of the library, which is appended to that of the model."""
    texts = map(inspect.getsource, (library_sources, library))
    return OWN_IMPORT.sub("", "\n".join(texts))


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`edits` are (old, new) pairs. Each old text occurs once in the model, else in the library."""

    name: str
    breaks: Sequence[str]  # the requirements that it violates; none if benign: it must pass
    edits: Sequence[tuple[str, str]]
    drops: Sequence[str] = ()  # profiles that it does not claim
    text: str = ""  # the whole source of the model, if not the stored one

    @property
    def source(self) -> str:
        texts = [self.text or model_source(), library_source()]
        for old, new in self.edits:
            place = 0 if old in texts[0] else 1
            if texts[place].count(old) != 1:
                where = f"stands {texts[place].count(old)} times in the model or its library"
                raise ValueError(f"Mutant {self.name!r}: {old!r} {where}.")
            texts[place] = texts[place].replace(old, new)
        return "\n".join(texts)


def module_of(mutant: Mutant) -> types.ModuleType:
    module = types.ModuleType("datarax_conformance_mutant")
    sys.modules[module.__name__] = module  # dataclasses look up their module here
    exec(compile(mutant.source, "mutant.py", "exec"), vars(module))
    return module


def adapter_of(mutant: Mutant) -> model_adapter.Adapter:
    """The model's adapter over the mutant's text of the model."""
    module = module_of(mutant)
    adapter = model_adapter.Adapter()
    adapter.new_program, adapter.new_stream = module.LibraryProgram, module.open_stream
    adapter.refused, adapter.described = module.Refused, module.described
    adapter.capabilities = (adapter.capabilities | {"jax"}) - set(mutant.drops)
    return adapter
