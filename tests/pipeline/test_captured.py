"""NNX objects that a function reaches by itself are found wherever it can hold them."""

import collections
import dataclasses
import functools
import types

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax import Pipeline
from datarax.errors import CapturedError, StageError
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import MemorySource, MemorySourceConfig


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(2))

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.w[...]}


MODEL = Model()
MODELS = {"one": [MODEL]}


def by_global(batch):
    return MODEL(batch)


def by_helper(batch):
    return by_global(batch)


def by_container(batch):
    return MODELS["one"][0](batch)


def by_default(batch, model=MODEL):
    return model(batch)


class Trainer:
    def __init__(self):
        self.model = Model()

    def evaluate(self, batch):
        return self.model(batch)

    def __call__(self, batch):
        return self.model(batch)


def by_closure():
    model = Model()
    return lambda batch: model(batch)


@dataclasses.dataclass
class Parts:
    model: Model = dataclasses.field(default_factory=Model)
    scale: float = 2.0

    def double(self, batch):
        return {**batch, "x": self.scale * batch["x"]}

    def use(self, model, batch):
        return model(self.double(batch))

    def use_mine(self, batch):
        return self.use(self.model, batch)


class Nested:
    def __init__(self):
        self.parts = types.SimpleNamespace(model=Model())

    def use(self, batch):
        return self.parts.model(batch)


class Constants:
    model = MODEL


TRAINER, PARTS, NAMESPACE = Trainer(), Parts(), types.SimpleNamespace(model=MODEL)
SET, MAPPING = {MODEL}, collections.UserDict(model=MODEL)
LIBRARY = types.ModuleType("library")
LIBRARY.model = MODEL


def by_set(batch):
    return next(iter(SET))(batch)


CAPTURING = {
    "attribute of a namespace": lambda batch: NAMESPACE.model(batch),
    "attribute of a dataclass": lambda batch: PARTS.model(batch),
    "method of a global object": lambda batch: TRAINER.evaluate(batch),
    "method by another method": lambda batch: PARTS.use_mine(batch),
    "attribute of an attribute": Nested().use,
    "attribute of a class": lambda batch: Constants.model(batch),
    "attribute of an imported module": lambda batch: LIBRARY.model(batch),
    "set": by_set,
    "mapping of the user's": lambda batch: MAPPING["model"](batch),
    "global": by_global,
    "helper": by_helper,
    "container": by_container,
    "default": by_default,
    "closure": by_closure(),
    "partial": functools.partial(lambda model, batch: model(batch), MODEL),
    "partial of JAX's": jax.tree_util.Partial(lambda model, batch: model(batch), MODEL),
    "jitted": jax.jit(by_global),
    "method of a plain object": Trainer().evaluate,
    "plain callable": Trainer(),
}


def pipeline(*stages):
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(8, dtype=np.float32)})
    return Pipeline(source=source, stages=list(stages), batch_size=4)


@pytest.mark.spec("ERR-032")
@pytest.mark.parametrize("function", CAPTURING.values(), ids=CAPTURING)
def test_a_stage_that_takes_modules_from_outside_is_refused(function):
    with pytest.raises(StageError, match="must hold the NNX objects that it uses"):
        pipeline(function)


@pytest.mark.spec("ERR-032")
def test_an_operator_is_searched_too():
    operator = ElementOperator(
        ElementOperatorConfig(), fn=lambda element, key: element.update_data(MODEL(element.data))
    )
    with pytest.raises(StageError, match=r"takes \['MODEL'\] from outside"):
        pipeline(operator)


@pytest.mark.spec("SCAN-018")
@pytest.mark.parametrize("function", CAPTURING.values(), ids=CAPTURING)
def test_a_scan_of_a_function_that_reaches_modules_is_refused(function):
    stream = pipeline()
    with pytest.raises(CapturedError, match="by itself") as error:
        stream.scan(function, 2)
    assert error.value.names
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-018")
def test_the_bound_method_of_a_module_is_refused_as_the_function_of_a_scan():
    with pytest.raises(CapturedError, match=r"reaches \['self'\]"):
        pipeline().scan(MODEL.__call__, 2)


@pytest.mark.spec("SCAN-018")
def test_a_module_is_refused_as_the_function_of_a_scan():
    with pytest.raises(CapturedError, match=r"reaches \['step_fn'\]"):
        pipeline().scan(MODEL, 2)


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_a_function_does_not_use_of_an_object_is_no_matter():
    parts = Parts()
    parts.update = lambda state, batch: state.model(batch)  # no method, though it looks like one
    state = types.SimpleNamespace(scale=2.0, model=None)

    def by_name(batch):
        kept = {}
        kept.update(x=batch["x"] * state.scale * parts.scale / 2)
        return kept

    for step in (
        lambda batch: parts.double(batch),
        by_name,
        lambda batch: by_name(batch) | {"y": getattr(state, "model", None) or batch["x"]},
        functools.partial(lambda config, batch: {"x": batch["x"] * config.scale}, parts),
    ):
        assert pipeline(step).scan(step, 2)["x"][0, 1] == 4
    for step in (
        lambda model, batch: parts.use(model, batch)["x"],
        lambda model, batch: parts.update(types.SimpleNamespace(model=model), batch)["x"] * 2,
    ):
        assert pipeline().scan(step, 2, modules=[parts.model])[0, 1] == 4


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_is_given_openly_is_accepted():
    model = Model()
    doubled = pipeline(model).scan(lambda batch: batch["x"], 2)
    given = pipeline().scan(lambda model, batch: model(batch)["x"], 2, modules=[model])
    np.testing.assert_array_equal(doubled, given)
    model.w[...] = jnp.float32(0)
    assert not pipeline(model.__call__).step()["x"].any()
