"""The closed vocabulary of operations that programs are made of (spec/tables/ops.toml).

Operators and indexing only, so one function serves NumPy, JAX, PyTorch and TensorFlow arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: `op(*batches)` if plain; `op.run` if it has parameters, state or keys."""

    run: Callable[
        ..., tuple[Fields, Fields]
    ]  # run(params, state, *batches[, keys]) -> batch, state
    params: Mapping[str, float] = dataclasses.field(default_factory=dict)
    state: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keys: bool = False  # wants the node's key of each record, (rows, 2) uint32, as last argument

    def __call__(self, *batches: Fields) -> Fields:
        return self.run(self.params, self.state, *batches)[0]


def _affine(params: Fields, state: Fields, batch: Fields) -> tuple[Fields, Fields]:
    return {**batch, "x": batch["x"] * params["a"] + params["b"]}, state


def _add(params: Fields, state: Fields, *batches: Fields) -> tuple[Fields, Fields]:
    total = functools.reduce(operator.add, [batch["x"] for batch in batches])
    return {**batches[0], "x": total}, state


def _sub(params: Fields, state: Fields, left: Fields, right: Fields) -> tuple[Fields, Fields]:
    return {**left, "x": left["x"] - right["x"]}, state


@dataclasses.dataclass(frozen=True)
class _Pick:
    """Equal to another of the same field, so that an engine need not compile it again."""

    field: str

    def __call__(self, params: Fields, state: Fields, batch: Fields) -> tuple[Fields, Fields]:
        return {self.field: batch[self.field]}, state


def _count(params: Fields, state: Fields, batch: Fields) -> tuple[Fields, Fields]:
    had = state["had"] + 1
    return {**batch, "count": batch["id"] * 0 + had}, {"had": had}


def _keys(params: Fields, state: Fields, batch: Fields, keys: Any) -> tuple[Fields, Fields]:
    return {**batch, "keys": keys}, state


VOCABULARY: Mapping[str, Callable[..., Op]] = {
    "affine": lambda a, b: Op(_affine, params={"a": int(a), "b": int(b)}),
    "add": lambda: Op(_add),
    "sub": lambda: Op(_sub),
    "pick": lambda field: Op(_Pick(field)),
    "count": lambda: Op(_count, state={"had": 0}),
    "keys": lambda: Op(_keys, keys=True),
}


class Ops:
    """`ops("affine(2,1)")` is the operation of that form."""

    def __call__(self, form: str) -> Op:
        match = re.fullmatch(r"(\w+)(?:\(([^()]+)\))?", form)
        if match is None or match[1] not in VOCABULARY:
            raise ValueError(f"{form!r} is no operation; there are {', '.join(VOCABULARY)}.")
        return VOCABULARY[match[1]](*match[2].split(",") if match[2] else ())
