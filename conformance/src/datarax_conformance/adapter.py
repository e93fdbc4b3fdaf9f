"""What an engine's author writes against: a program comes in, a stream of NumPy batches out."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .arrays import decode, encode
from .ops import Ops

Batch = Mapping[str, Any]

PROFILES = (
    "step",
    "iter",
    "shuffle.valid",
    "shuffle.exact",
    "resume",
    "dag",
    "errors",
    "scan",
    "jax",
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A pipeline as plain data, unchecked here: the errors profile sends wrong programs."""

    columns: Mapping[str, np.ndarray]
    batch_size: int
    last_batch: str = "keep"
    seed: int | None = None
    nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    edges: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    sink: str | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Program:
        columns = {name: decode(column) for name, column in data["columns"].items()}
        return cls(**{**data, "columns": columns})

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "columns": {name: encode(column) for name, column in self.columns.items()},
        }


class Stream(Protocol):
    """One pipeline. An engine needs only the methods of the profiles that it claims."""

    def step(self) -> Batch: ...  # step
    def __iter__(self) -> Iterator[Batch]: ...  # iter
    def scan(self, length: int | None) -> Batch: ...  # scan: leaves are (length, rows, ...)
    def get_state(self) -> bytes: ...  # resume
    def set_state(self, state: bytes) -> None: ...  # resume

    # The rest is profile jax.
    @property
    def cursor(self) -> tuple[int, int]: ...
    def __len__(self) -> int: ...
    def seek(self, *, epoch: int, offset: int) -> None: ...
    def reset(self) -> None: ...
    # From the next batch on, `node` is another operation, or has other parameters.
    def replace(self, node: str, op: str, /) -> None: ...
    def change(self, node: str, op: str, /) -> None: ...
    def jit_steps(self, n: int) -> Sequence[Batch]: ...  # `n` steps inside one jit of the user's
    def grad(self, node: str) -> Batch: ...  # d sum(next batch's x) / d parameters of `node`


class Adapter(Protocol):
    """Translates a program into an engine's calls; it computes, orders and repairs nothing."""

    name: str
    version: str
    spec: str
    capabilities: frozenset[str]

    def build(self, program: Program, ops: Ops) -> Stream: ...
    def classify(self, exc: BaseException) -> tuple[str, Mapping[str, object]]: ...


def load_adapter(target: str) -> Adapter:
    """The adapter named by `module:Class` or `path/to/file.py:Class`."""
    place, _, name = target.rpartition(":")
    if not place:
        raise ValueError(f"An adapter is named `module:Class` or `file.py:Class`, got {target!r}.")
    if place.endswith(".py"):
        path = pathlib.Path(place)
        sys.path.insert(0, str(path.parent.resolve()))  # it may import its neighbours
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)()
