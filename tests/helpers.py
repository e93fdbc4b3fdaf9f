"""Helpers that several test files share: small pipelines, stages, modes, comparisons."""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datarax import Pipeline
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import EagerSourceBase, MemorySource, MemorySourceConfig, SourceData

# Programs of the spec, on the model and on the library.


def columns(length: int) -> dict[str, np.ndarray]:
    """Records with their number, `id`, and a field to work on, `x`."""
    return {
        "id": np.arange(length, dtype=np.int32),
        "x": np.arange(1, length + 1, dtype=np.float32),
    }


class Count(nnx.Module):
    """Numbers the batches that it gets."""

    def __init__(self):
        self.seen = nnx.Variable(jnp.array(0, jnp.int32))

    def __call__(self, batch):
        self.seen[...] += 1
        return {**batch, "count": jnp.zeros_like(batch["id"]) + self.seen[...]}


class Affine(nnx.Module):
    """`x * a + b`."""

    def __init__(self, a: float, b: float):
        self.a = nnx.Param(jnp.float32(a))
        self.b = nnx.Param(jnp.float32(b))

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.a[...] + self.b[...]}


def add(first, *rest):
    return {**first, "x": sum((other["x"] for other in rest), start=first["x"])}


def sub(first, second):
    return {**first, "x": first["x"] - second["x"]}


def record_words(batch, *, keys):
    """A stage that shows the keys that its rows get."""
    return {**batch, "keys": jax.random.key_data(keys)}


def batch_words(batch, *, key):
    """A stage that shows the key that its batch gets."""
    words = jax.random.key_data(key)
    return {**batch, "key": jnp.broadcast_to(words, (len(batch["id"]), 2))}


def stage_of(operation: str) -> Any:
    """The stage for an operation of the spec's table."""
    name, _, arguments = operation.rstrip(")").partition("(")
    match name:
        case "affine":
            return Affine(*map(int, arguments.split(",")))
        case "count":
            return Count()
        case "pick":
            return lambda batch: {arguments: batch[arguments]}
        case _:
            return {"add": add, "sub": sub, "keys": record_words}[name]


def pipeline_of(program: model.Program) -> Pipeline:
    """The library's pipeline for a program of the spec."""
    config = MemorySourceConfig(shuffle=program.seed is not None)
    common = {
        "source": MemorySource(config, dict(program.columns)),
        "batch_size": program.batch_size,
        "last_batch": program.last_batch,
        "rngs": None if program.seed is None else nnx.Rngs(program.seed),
    }
    if not program.nodes:
        return Pipeline(**common)
    nodes = {name: stage_of(operation) for name, operation in program.nodes.items()}
    return Pipeline.from_dag(**common, nodes=nodes, edges=program.edges, sink=program.sink)


def pipeline(
    stages: Sequence[Any] | None = None,
    *,
    length: int = 10,
    batch_size: int = 4,
    seed: int | None = None,
    shuffle: Any = None,
    cls: type[Pipeline] = Pipeline,
    **options: Any,
) -> Pipeline:
    """A pipeline over `columns(length)`, in stored order without a seed, else shuffled."""
    config = MemorySourceConfig(shuffle=seed is not None if shuffle is None else shuffle)
    options.setdefault("rngs", None if seed is None else nnx.Rngs(seed))
    source = options.pop("source", None) or MemorySource(config, columns(length))
    return cls(source=source, stages=stages, batch_size=batch_size, **options)


def sharding_of(*spec: Any, kind: AxisType = AxisType.Auto, **axes: int) -> NamedSharding:
    """A sharding over a mesh with these axes, by default only "data". The mesh has one device.

    If an axis is longer than 1, the device is repeated, and a test can only ask for the length.
    """
    axes = axes or {"data": 1}
    devices = np.full(tuple(axes.values()), jax.devices()[0])
    mesh = Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))
    return NamedSharding(mesh, PartitionSpec(*spec))


# Stages and sources.


def double(batch):
    return {**batch, "x": batch["x"] * 2}


def increment(batch):
    return {**batch, "x": batch["x"] + 1}


def _jitter(element, key):
    # A uniform number in [0, 1), made by hand: JAX's function takes a second to compile.
    noise = (jax.random.key_data(key)[1] >> 8).astype(jnp.float32) / 2**24
    return element.update_data({"x": element.data["x"] + noise})


def jitter(**options: Any) -> ElementOperator:
    """An augmentation: adds a different random number to every record."""
    return ElementOperator(ElementOperatorConfig(stochastic=True), fn=_jitter, **options)


class Scale(nnx.Module):
    """Multiplies by values of every kind that the user can change from outside."""

    def __init__(self):
        self.param = nnx.Param(jnp.float32(1))
        self.numpy_param = nnx.Param(np.ones(1, np.float32))
        self.tree = nnx.Variable({"a": jnp.float32(1)})
        self.array = jnp.float32(1)
        self.numpy = np.ones(1, np.float32)
        self.static = 1.0
        self.inner = Affine(1, 0)
        self.parts = nnx.List([Affine(1, 0)])

    def __call__(self, batch):
        scalars = self.param[...] * self.tree.get_value()["a"] * self.array * self.static
        factor = scalars * self.numpy_param[...][0] * self.numpy[0]
        return self.parts[0](self.inner({**batch, "x": batch["x"] * factor}))


class EqxScale(eqx.Module):
    """Multiplies by an array field of an Equinox module."""

    weight: jax.Array
    name: str = eqx.field(static=True, default="weight")

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.weight}


class Normalise(nnx.Module):
    """Batch normalisation with running statistics, then dropout with its own random stream."""

    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.norm = nnx.BatchNorm(1, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, batch):
        return {**batch, "x": self.dropout(self.norm(batch["x"][:, None]))[:, 0]}


class Numbers(EagerSourceBase):
    """A source that holds no data: record `i` is the number `i`."""

    def __init__(self, length: int, **options: Any):
        super().__init__(**options)
        self.length = length

    def __len__(self):
        return self.length

    def gather(self, records):
        return {"id": records}


class ReadOnly(nnx.Module):
    """A sized source with only random access. It makes its own order.

    Its rows past the end are nonsense, as any source's may be.
    """

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def get_batch_at(self, start, batch_size, key):
        offset = start + jnp.arange(batch_size, dtype=start.dtype)
        words = jnp.zeros(2, jnp.uint32) if key is None else jax.random.key_data(key)
        return {
            "offset": jnp.where(offset < start.dtype.type(self.length), offset, 99),
            "key": jnp.broadcast_to(words, (batch_size, 2)),
        }


class Endless(nnx.Module):
    """A source without end. The record at an offset is the offset."""

    def get_batch_at(self, start, batch_size, key):
        words = jnp.zeros(2, jnp.uint32) if key is None else jax.random.key_data(key)
        return {
            "id": start + jnp.arange(batch_size, dtype=start.dtype),
            "key": jnp.broadcast_to(words, (batch_size, 2)),
        }


# Modes: each takes the next `count` batches. By the law of the spec, all give the same ones.


def whole(batch):
    """The function of a scan that returns the batches themselves."""
    return batch


def by_step(pipeline: Any, count: int) -> list[Any]:
    return [pipeline.step() for _ in range(count)]


def by_for(pipeline: Any, count: int) -> list[Any]:
    batches = []
    while len(batches) < count:
        for batch in pipeline:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def by_scan(pipeline: Pipeline, count: int) -> list[Any]:
    return unstack(pipeline.scan(whole, count))


MODES: dict[str, Callable[[Any, int], list[Any]]] = {
    "step": by_step,
    "for": by_for,
    "scan": by_scan,
}


@contextlib.contextmanager
def ahead(batches: int, sides: int = 1) -> Iterator[None]:
    """Makes `for` and `step` compute `batches` batches at a time, as soon as they may.

    With several `sides`, the batches count as large, so that each processor gets its own call.
    """
    from datarax.pipeline import _compute_ahead, _program

    with pytest.MonkeyPatch.context() as patch:
        if sides > 1:
            patch.setattr(_program, "ONE_THREAD_BYTES", 0)
            patch.setattr(_compute_ahead, "processors", lambda: sides)
        patch.setattr(_compute_ahead, "AHEAD", batches)
        patch.setattr(_compute_ahead, "AHEAD_COMPILE", 1e9)
        patch.setattr(_compute_ahead, "PATIENCE", 0)
        yield


def unstack(outs: Any) -> list[Any]:
    """The batches that a scan has stacked, one by one."""
    count = len(jax.tree.leaves(outs)[0])
    return [jax.tree.map(lambda x, i=i: x[i], outs) for i in range(count)]


# Comparing.


def assert_same(got: Any, expected: Any) -> None:
    """Bit for bit: structure, types, shapes, values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(expected), strict=True
    ):
        x, y = _plain(x), _plain(y)
        name = jax.tree_util.keystr(path)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), f"{name}: {x.tolist()} is not {y.tolist()}"


def _plain(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.ascontiguousarray(x)


def rows(batches: Iterable[Any], mask: str = "mask") -> Any:
    """The rows of some batches, joined, without padding."""
    batches = [jax.tree.map(_plain, batch) for batch in batches]
    batches = [
        jax.tree.map(lambda x, keep=b[mask]: x[keep], {k: v for k, v in b.items() if k != mask})
        if mask in b
        else b
        for b in batches
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


class Alike:
    """A callable that equals all others of its class, whatever they compute."""

    def __init__(self, function):
        self.function = function

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 0

    def __call__(self, batch):
        return self.function(batch)


def ids(batches: Iterable[Any]) -> list[int]:
    """The numbers of the records in some batches."""
    batches = list(batches)
    return rows(batches)["id"].tolist() if batches else []


def state_of(pipeline: Pipeline) -> dict[str, Any]:
    """The cursor and all arrays that a pipeline remembers, by path, without the source's data."""
    data, remembered = nnx.state(pipeline, SourceData, ...)
    del data
    return {
        "cursor": tuple(pipeline.cursor),
        **{
            ".".join(map(str, path)): _plain(leaf)
            for path, variable in nnx.to_flat_state(remembered)
            for leaf in jax.tree.leaves(variable)
        },
    }


class Traces(collections.Counter):
    """Counts how often functions are traced: `traces(fn)` counts `fn` under its name."""

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args):
            self[function.__name__] += 1
            return function(*args)

        counted.__name__ = function.__name__
        return counted


def graph(nodes, edges, sink, *, seed=None, length=4, batch_size=4, **options):
    """A pipeline from a graph over `columns(length)`."""
    return Pipeline.from_dag(
        source=MemorySource(MemorySourceConfig(shuffle=seed is not None), columns(length)),
        nodes=nodes,
        edges=edges,
        sink=sink,
        batch_size=batch_size,
        rngs=None if seed is None else nnx.Rngs(seed),
        **options,
    )
