"""Adapter of the model, the oracle: the Python in the spec itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from . import library, model
from .adapter import Program
from .ops import Ops
from .version import SPEC


class Adapter:
    name = "model"
    version = SPEC
    spec = SPEC
    capabilities = frozenset(
        ["step", "iter", "shuffle.valid", "shuffle.exact", "resume", "dag", "errors", "scan"]
    )
    new_program, new_stream = library.LibraryProgram, staticmethod(library.open_stream)
    refused, described = model.Refused, staticmethod(library.described)

    def build(self, program: Program, ops: Ops) -> library.Library:
        del ops  # the model has its own
        fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
        return self.new_stream(self.new_program(**fields))

    def classify(self, exc: BaseException) -> tuple[str, Mapping[str, object]]:
        if isinstance(exc, self.refused):
            return exc.code, self.described(exc)
        return "unclassified", {}
