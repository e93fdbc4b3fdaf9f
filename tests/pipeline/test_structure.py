"""Pipelines of equal structure share what is compiled, which goes when the last of them does."""

import functools
import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    MODES,
    Count,
    Traces,
    by_for,
    by_step,
    columns,
    ids,
    pipeline,
    whole,
)

from datarax import Pipeline
from datarax.pipeline._binding import Binding
from datarax.pipeline._structure import _RECENT
from datarax.sources import (
    MemorySource,
    MemorySourceConfig,
)


@pytest.mark.spec("DAG-014", "SCAN-014")
def test_pipelines_of_equal_structure_share_their_programs():
    traces = Traces()

    def body(batch):
        return {**batch, "x": batch["x"] * 3}

    body = traces(body)

    def consume(stream):
        by_step(stream, 2), by_for(stream, 2), stream.scan(whole, 2)
        return ids([stream.step()])

    def source(seed):
        data = {**columns(10), "x": np.full(10, seed, np.float32)}
        return MemorySource(MemorySourceConfig(shuffle=True), data)

    def chain(seed):
        return pipeline([body], source=source(seed), seed=seed)

    def graph(seed):
        return Pipeline.from_dag(
            source=source(seed),
            nodes={"body": body},
            edges={"body": []},
            sink="body",
            batch_size=4,
            rngs=nnx.Rngs(seed),
        )

    first = consume(chain(0))
    once = traces["body"]
    streams = [chain(0), graph(0), chain(1), graph(1)]
    assert [consume(stream) == first for stream in streams] == [True, True, False, False]
    assert traces["body"] == once  # the look at their shapes is shared, too


@pytest.mark.internal
def test_what_was_compiled_for_a_pipeline_goes_with_it():
    def stage(n):
        return lambda batch: batch | {"id": batch["id"] + n}

    alive = weakref.WeakSet()
    for i in range(2 * (most := _RECENT.maxlen)):
        fresh = stage(i)
        alive.add(fresh)
        assert ids([pipeline([fresh], length=4, batch_size=2).step()]) == [i, i + 1]
    gc.collect()
    assert len(alive) <= most


class Wide(np.ndarray):
    """An array that a weak reference can be made to."""


def by_closure(wide):
    return lambda batch: {**batch, "y": batch["x"] + wide[0]}


def by_default(wide):
    def stage(batch, wide=wide):
        return {**batch, "y": batch["x"] + wide[0]}

    return stage


def by_another_function(wide):
    inner = by_closure(wide)
    return lambda batch: inner(batch)


def by_object(wide):
    class Adds:
        def __init__(self):
            self.wide = wide

        def __call__(self, batch):
            return {**batch, "y": batch["x"] + self.wide[0]}

    return Adds()


def by_method(wide):
    return by_object(wide).__call__


def by_partial(wide):
    return functools.partial(lambda wide, batch: {**batch, "y": batch["x"] + wide[0]}, wide)


def by_jit(wide):
    return jax.jit(by_closure(wide))


class First(nnx.Module):
    def __init__(self, functions):
        self.functions = functions

    def __call__(self, batch):
        return self.functions[0](batch)


def by_tuple(wide):
    return First((by_closure(wide),))


WAYS = [by_closure, by_default, by_another_function, by_object, by_method, by_partial, by_jit]
WAYS += [by_tuple]


@pytest.mark.internal
@pytest.mark.parametrize("way", WAYS)
def test_arrays_that_a_stage_reaches_go_with_its_pipeline(way):
    arrays = []
    for i in range(3):
        wide = np.full(8, i, np.float32).view(Wide)
        arrays.append(weakref.ref(wide))
        batch = pipeline([way(wide)], length=4).step()
        assert (batch["y"] - batch["x"]).tolist() == [i] * 4
        del wide
    gc.collect()
    assert [array() for array in arrays] == [None] * 3


@pytest.mark.internal
def test_nothing_keeps_a_stage_that_was_replaced():
    """Neither what looked at a loop's shorter last batch nor a scan with other modules."""
    stream, model = pipeline([by_closure(np.ones(1, np.float32).view(Wide))], length=6), Count()
    wide = np.ones(1, np.float32).view(Wide)
    array = weakref.ref(wide)
    stream.nodes[next(iter(stream.nodes))] = by_object(wide)
    del wide
    list(stream)
    stream.scan(lambda model, batch: batch["y"].sum(), 1, modules=(model,))
    stream.nodes[next(iter(stream.nodes))] = by_closure(np.ones(1, np.float32).view(Wide))
    stream.scan(lambda model, batch: batch["y"].sum(), 1, modules=(Count(),))
    gc.collect()
    assert array() is None


@pytest.mark.internal
def test_what_was_compiled_for_layers_serves_the_next_pipeline_of_them():
    """Whose initialisers are functions made in others, of numbers and tuples."""

    class Layer(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

        def __call__(self, batch):
            return {**batch, "x": self.linear(batch["x"][:, None])[:, 0]}

    def later(batch):
        return batch if batch else unknown  # which is not there yet

    assert Binding((pipeline([Layer(), later]),)).structure.lasts is False
    unknown = None
    assert Binding((pipeline([Layer(), later]),)).structure.lasts is True


@pytest.mark.internal
def test_a_structure_that_cannot_be_hashed_is_a_structure():
    class Table(nnx.Module):
        def __init__(self):
            self.factors = nnx.static({"x": 2.0})

        def __call__(self, batch):
            return {**batch, "x": batch["x"] * self.factors["x"]}

    class Layers(eqx.Module):
        weights: list
        offset: np.ndarray

        def __call__(self, batch):
            return {**batch, "x": batch["x"] * self.weights[0] + self.offset}

    layers = Layers([jnp.float32(3)], np.float32([1]))
    stream = pipeline([Table(), layers], length=12, batch_size=2)
    for mode in MODES.values():
        stream.reset()
        assert [b["x"].tolist() for b in mode(stream, 2)] == [[7, 13], [19, 25]]
