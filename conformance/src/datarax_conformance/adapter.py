"""What an adapter implements: it takes a program and gives a stream of NumPy batches."""

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
    """A pipeline as plain data, unchecked: the errors profile sends wrong programs."""

    columns: Mapping[str, np.ndarray]
    batch_size: int
    last_batch: str = "keep"
    seed: int | None = None
    nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    edges: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    sink: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # only in profile jax

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Program:
        columns = {name: decode(column) for name, column in data["columns"].items()}
        return cls(**{**data, "columns": columns})

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **{name: x for name, x in fields.items() if name != "options" or x},
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
    # From the next batch on, `replace` gives `node` another operation, `change` other parameters.
    def replace(self, node: str, op: str, /) -> None: ...
    def change(self, node: str, op: str, /) -> None: ...
    def jit_steps(self, n: int) -> Sequence[Batch]: ...  # `n` steps in one jit of the user
    # d sum(x) / d parameters of `node`, over the next batch or a scan of `length` batches
    def grad(self, node: str, length: int | None = None) -> Batch: ...
    def copy(self, how: str, /) -> Stream: ...  # "deepcopy", or "pickle" and back
    def ask(self, what: str, /, **arguments: Any) -> Any: ...  # see QUESTIONS


QUESTIONS: Mapping[str, str] = {
    "names": "the names of the nodes in the order in which they run",
    "specs": "type and shape of each field of each node and of the batch",
    "show": "the pipeline as a text; `how` is print, mermaid or html",
    "program": "the text of the compiled step",
    "order": "records at offsets of an epoch; `how` is eager, jit or vmap",
    "places": "offsets at which records stand in an epoch: the inverse of `order`",
    "read": "`n` rows from `start` on by random access to the source, under the key of `seed`",
    "replay": "what every node gives for one record",
    "fold": "`length` batches through a function of the closed vocabulary FOLDS",
    "fresh": "batches through `n` new functions, one after the other",
    "kept": "how many of those functions are still in memory",
    "counters": "how often the streams of the generator given by the user were drawn from",
    "mend": "from now on every record can be read",
    "stats": "seconds `waited` for rows and `computed`",
}

# The functions of `fold`. With `modules`, "total" multiplies each sum by 3 and adds the number of
# calls so far.
FOLDS: Mapping[str, str] = {
    "total": "the sum of x",
    "captures": "reaches a module that it was not given",
}


class Adapter(Protocol):
    """Translates a program into an engine's calls. It computes, orders and repairs nothing.

    An adapter may also have `limits`: features that the engine lacks within a profile that it
    claims, each with the reason. `Case.features` gives the names: "last_batch pad", "records *"
    (more than fit into memory), "op count" and, for profile jax, actions ("replace", "ask replay"),
    "source mixture" or "option kinds". "*" matches anything. The verdict on such cases is
    UNSUPPORTED, which is never a pass.
    """

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
    try:
        return _load(place, name)
    except Exception as exc:
        raise ValueError(f"cannot load {target}: {type(exc).__name__}: {exc}") from exc


def _load(place: str, name: str) -> Adapter:
    if place.endswith(".py"):
        path = pathlib.Path(place)
        sys.path.append(str(path.parent.resolve()))  # the file may import its neighbours
        # Under another name: a file named like its engine must not hide the engine from its import.
        spec = importlib.util.spec_from_file_location(f"_adapter_in_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # pickle looks classes up here
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)()
