"""NNX objects that a function reaches by itself are found wherever it can hold them."""

import collections
import dataclasses
import functools
import re
import threading
import types
import weakref
from typing import NamedTuple

import equinox as eqx
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import TraceContextError

from datarax import Pipeline
from datarax.errors import CapturedError, StageError
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.pipeline._captured import FIRST, MOST, captured
from datarax.pipeline._jaxpr import constants
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

    @property
    def current(self):
        return self.model


class MoreParts(Parts):
    def use_mine(self, batch):
        return super().use_mine(batch)


class Nested:
    def __init__(self):
        self.parts = types.SimpleNamespace(model=Model())

    def use(self, batch):
        return self.parts.model(batch)


class Constants:
    model = MODEL


class Slots:
    __slots__ = ("model",)

    def __init__(self):
        self.model = Model()


@dataclasses.dataclass(frozen=True, slots=True)
class CallableSlots:
    model: Model

    def __call__(self, batch):
        return self.model(batch)


class CallableTuple(NamedTuple):
    model: Model

    def __call__(self, batch):
        return self.model(batch)


class Fields(dict):
    __getattr__ = dict.get


class Holders:
    def __init__(self):
        self.all, self.named = [Model()], {"one": Model(), "scale": 2.0}
        self.nets = types.SimpleNamespace(models=nnx.List([Model()]))

    def use(self, batch):
        return self.nets.models[0](batch)

    def scaled(self, batch):
        return {**batch, "x": batch["x"] * self.named["scale"]}


def with_teacher(teacher):
    def decorate(function):
        @functools.wraps(function)
        def inner(batch):
            return function(teacher(batch))

        return inner

    return decorate


TRAINER, PARTS, NAMESPACE = Trainer(), Parts(), types.SimpleNamespace(model=MODEL)
SET, MAPPING = {MODEL}, collections.UserDict(model=MODEL)
MORE, SLOTS, HOLDERS = MoreParts(), Slots(), Holders()
FIELDS = Fields(model=MODEL, scale=2.0)
LIBRARY, PACKAGE = types.ModuleType("library"), types.ModuleType("package")
LIBRARY.model, PACKAGE.library = MODEL, LIBRARY
QUEUE = collections.deque([MODEL])


def by_set(batch):
    return next(iter(SET))(batch)


def by_alias(batch):
    trainer = PARTS
    return trainer.model(batch)


def use_trainer(scale, trainer, batch):
    del scale
    return trainer.model(batch)


def by_argument(batch):
    return use_trainer(batch["x"], PARTS, batch)


def by_keyword(batch):
    return use_trainer(2.0, batch=batch, trainer=PARTS)


def by_loop(batch):
    for model in HOLDERS.all:
        batch = model(batch)
    return batch


CAPTURING = {
    "attribute of a namespace": lambda batch: NAMESPACE.model(batch),
    "attribute of a dataclass": lambda batch: PARTS.model(batch),
    "method of a global object": lambda batch: TRAINER.evaluate(batch),
    "method by another method": lambda batch: PARTS.use_mine(batch),
    "attribute of an attribute": Nested().use,
    "attribute of a class": lambda batch: Constants.model(batch),
    "attribute of an imported module": lambda batch: LIBRARY.model(batch),
    "attribute of a module in another": lambda batch: PACKAGE.library.model(batch),
    "element of a queue": lambda batch: QUEUE[0](batch),
    "wrapper with another's name": with_teacher(MODEL)(lambda batch: {"x": batch["x"] * 2}),
    "wrapper of a library's function": with_teacher(lambda batch: MODEL(batch)["x"])(jnp.sin),
    "attribute with a slot": lambda batch: SLOTS.model(batch),
    "attribute by name": lambda batch: getattr(TRAINER, "model")(batch),  # noqa: B009
    "attribute by `__getattr__`": lambda batch: FIELDS.model(batch),
    "property": lambda batch: PARTS.current(batch),
    "method of a base class": MORE.use_mine,
    "alias": by_alias,
    "argument of a helper": by_argument,
    "keyword of a helper": by_keyword,
    "element of a list of an object": lambda batch: HOLDERS.all[0](batch),
    "element of a dict of an object": lambda batch: HOLDERS.named["one"](batch),
    "some element of an object": by_loop,
    "element of an attribute of an attribute": HOLDERS.use,
    "inner function": lambda batch: jax.vmap(lambda x: TRAINER.model({"x": x}))(batch["x"]),
    "function in a list": lambda batch: [by_global][0](batch),
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
    "gradient": jax.grad(lambda batch: MODEL(batch)["x"].sum()),
    "plain callable": Trainer(),
    "plain callable that is called": lambda batch: TRAINER(batch),
    "plain callable that is handed on": lambda batch: jax.vmap(TRAINER)(batch),
    "callable with slots": CallableSlots(MODEL),
    "callable named tuple": CallableTuple(MODEL),
}


SOME = ["global", "closure", "method of a plain object", "jitted", "callable named tuple"]


def pipeline(*stages):
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(8, dtype=np.float32)})
    return Pipeline(source=source, stages=list(stages), batch_size=4)


@pytest.mark.spec("SCAN-018", "ERR-032")
@pytest.mark.parametrize("function", CAPTURING.values(), ids=CAPTURING)
def test_a_module_from_outside_is_found_wherever_it_is_held(function):
    traced = jax.jit(lambda batch: function(batch)).trace({"x": jnp.ones(4)}).jaxpr
    assert captured(function, constants(traced))


@pytest.mark.spec("ERR-032")
@pytest.mark.parametrize("how", SOME)
def test_a_stage_that_takes_modules_from_outside_is_refused(how):
    with pytest.raises(StageError, match="must hold the NNX objects that it uses"):
        pipeline(CAPTURING[how])


@pytest.mark.spec("ERR-032")
def test_an_operator_is_searched_too():
    operator = ElementOperator(
        ElementOperatorConfig(), fn=lambda element, key: element.update_data(MODEL(element.data))
    )
    with pytest.raises(StageError, match=r"takes \['MODEL'\] from outside"):
        pipeline(operator)


@pytest.mark.spec("SCAN-018")
@pytest.mark.parametrize("how", SOME)
def test_a_scan_of_a_function_that_reaches_modules_is_refused(how):
    stream = pipeline()
    with pytest.raises(CapturedError, match="by itself") as error:
        stream.scan(CAPTURING[how], 2)
    assert error.value.names
    assert stream.cursor == (0, 0)


@pytest.mark.spec("SCAN-018")
def test_the_bound_method_of_a_module_is_refused_as_the_function_of_a_scan():
    told = "For a method of an object `x`: `scan(Model.__call__, modules=(x,))`."
    with pytest.raises(CapturedError, match=rf"reaches \['self'\].*{re.escape(told)}"):
        pipeline().scan(MODEL.__call__, 2)


@pytest.mark.spec("SCAN-018")
def test_a_module_is_refused_as_the_function_of_a_scan():
    told = "For a method of an object `x`: `scan(Model.__call__, modules=(x,))`."
    with pytest.raises(CapturedError, match=rf"reaches \['step_fn'\].*{re.escape(told)}"):
        pipeline().scan(MODEL, 2)


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_a_module_that_holds_no_array_may_change_as_well():
    drop = nnx.Dropout(0.5)

    def use(batch):
        return {"x": drop(batch["x"], rngs=nnx.Rngs(0))}

    with pytest.raises(CapturedError, match=r"reaches \['drop'\]"):
        pipeline().scan(use, 2)
    with pytest.raises(StageError, match="drop"):
        pipeline(use)


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


class Scaled:
    """Has a model, and takes the one that it is given."""

    def __init__(self):
        self.model, self.scale = Model(), 2.0

    def __call__(self, model, batch):
        return self.model(batch)

    def loss(self, model, batch):
        return (model(batch)["x"] * self.scale).sum()

    def stage(self, batch):
        return {**batch, "x": batch["x"] * self.scale}

    def inner(self):
        def loss(model, batch):
            return (model(batch)["x"] * self.scale).sum()

        return loss


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_an_object_with_a_model_may_be_used_for_the_rest():
    scaled = Scaled()

    def shadows(model, batch):
        def loss(scaled):
            return (scaled.model(batch)["x"] * scaled.scale).sum()

        return loss(types.SimpleNamespace(model=model, scale=scaled.scale))

    def renames(model, batch):
        used = scaled
        scale, used = used.scale, types.SimpleNamespace(model=model)
        return (used.model(batch)["x"] * scale).sum()

    def hands_on(model, batch):
        return use_scale(scaled, model(batch)["x"]).sum()

    def closes_over(model, batch):
        return jax.vmap(lambda x: x * scaled.scale)(model(batch)["x"]).sum()

    for step in (scaled.loss, scaled.inner(), shadows, renames, hands_on, closes_over):
        losses = pipeline().scan(step, 2, modules=[scaled.model])
        assert losses.tolist() == [4 * 6, 4 * 22]
    for stage in (scaled.stage, HOLDERS.scaled, lambda batch: {"x": batch["x"] * FIELDS.scale}):
        assert pipeline(stage).step()["x"].tolist() == [0, 2, 4, 6]


def use_scale(scaled, x):
    return x * scaled.scale


@pytest.mark.spec("SCAN-018")
def test_what_is_reached_is_named_as_the_caller_would_write_it():
    scaled = Scaled()
    for step, name in {
        (lambda batch: scaled.loss(scaled.model, batch)): "scaled.model",
        by_argument: "PARTS.model",
        HOLDERS.use: "self.nets.models",
        (lambda batch: HOLDERS.named["one"](batch)): "HOLDERS.named['one']",
        functools.partial(use_trainer, 2.0, PARTS): "trainer.model",
    }.items():
        with pytest.raises(CapturedError) as error:
            pipeline().scan(step, 2)
        assert error.value.names == [name]


class Loose(dict):
    """Says that it has any attribute, and then raises `KeyError`."""

    __getattr__ = dict.__getitem__

    def __call__(self, batch):
        return {**batch, "x": batch["x"] * self.scale}

    __hash__ = object.__hash__


LOOSE = Loose(scale=2.0)


@pytest.mark.spec("DAG-015", "SCAN-001")
@pytest.mark.parametrize(
    "stage", [LOOSE, lambda batch: {"x": batch["x"] * LOOSE.scale}], ids=["stage", "global"]
)
def test_an_object_with_a_getattr_of_its_own_is_not_asked_for_more(stage):
    stream = pipeline(stage)
    assert stream.step()["x"].tolist() == [0, 2, 4, 6]
    assert pipeline().scan(stage, 2)["x"][0].tolist() == [0, 2, 4, 6]
    assert list(stream.nodes) == ["Loose" if stage is LOOSE else "lambda"]
    with pytest.raises(StageError, match="Stage 'Loose' failed: KeyError: 'scale'"):
        pipeline(Loose())


WORDS = [*range(FIRST), MODEL]
PAIRS = {"pairs": [[i] * FIRST for i in range(FIRST)], "models": [MODEL]}
DEEP = [[i] * FIRST for i in range(MOST // FIRST)] + [[MODEL]]


@pytest.mark.spec("SCAN-018")
def test_of_a_long_list_the_first_elements_are_looked_at():
    used = [MODEL.w.get_raw_value()]
    assert captured(lambda batch: batch["x"] * sum(WORDS), used) == []
    assert captured(lambda batch: PAIRS["models"][0](batch), used) == ["PAIRS['models'][0]"]
    assert captured(lambda batch: PAIRS["models"][0](batch)) == []
    assert captured(lambda batch: DEEP, used) == []


OTHER = types.ModuleType("other")
exec(
    "def use(trainer, batch, name='mod'):\n    return getattr(trainer, name + 'el')(batch)",
    vars(OTHER),
)


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_another_module_does_with_an_object_is_seen():
    def step(batch):
        return OTHER.use(TRAINER, batch)

    with pytest.raises(CapturedError, match=r"reaches \['TRAINER.model'\]"):
        pipeline().scan(step, 2)
    with pytest.raises(StageError, match=r"takes \['TRAINER.model'\] from outside"):
        pipeline(step)


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_is_changed_is_seen_too():
    holder = types.SimpleNamespace(norm=nnx.BatchNorm(1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))

    def normalise(batch):
        return {"x": holder.norm(batch["x"][:, None])}

    def draw(batch):
        return {"x": batch["x"] + jax.random.normal(holder.rngs())}

    for step, name in ((normalise, "norm"), (draw, "rngs")):
        with pytest.raises(CapturedError, match=f"holder.{name}"):
            pipeline().scan(step, 2)
        with pytest.raises(StageError, match=f"(?s)TraceContextError.*'holder.{name}'.* outside"):
            pipeline(step)


class Transforming:
    """Trains its model in the ways of NNX, and has others, of which one is used."""

    def __init__(self):
        self.unused, self.model, self.scale = Model(), Model(), Model()
        self.parts = {"the.model": self.model}
        self.bump = lambda: self.count({"x": 0})

    def grad(self, batch):
        return nnx.grad(lambda model: model(batch)["x"].sum())(self.model).w[...] + batch["x"]

    def jit(self, batch):
        return nnx.jit(lambda model, batch: model(batch)["x"])(self.model, batch)

    def vmap(self, batch):
        return nnx.vmap(lambda model, x: model({"x": x})["x"], in_axes=(None, 0))(
            self.model, batch["x"]
        )

    def remat(self, batch):
        return nnx.remat(lambda model, batch: model(batch)["x"])(self.model, batch)

    def count(self, batch):
        self.model.w[...] += 1
        return batch["x"]

    @property
    def current(self):
        return self.model

    @staticmethod
    def count_in(trainer, batch):
        return trainer.count(batch)

    def helped(self, batch):
        return self.count_in(self, batch) * self.scale.w[...]

    def by_property(self, batch):
        self.current.w[...] += self.scale.w[...]
        return batch["x"]

    def by_word(self, batch):
        getattr(self, f"mod{'el'}").w[...] += self.scale.w[...]
        return batch["x"]

    def by_key(self, batch):
        self.parts["the.model"].w[...] += self.scale.w[...]
        return batch["x"]

    def by_function(self, batch):
        self.bump()
        return batch["x"] * self.scale.w[...]


WAYS = [x for x in vars(Transforming) if not x.startswith("_") and x not in ("current", "count_in")]


@pytest.mark.spec("SCAN-018", "ERR-032")
@pytest.mark.parametrize("how", WAYS)
def test_what_fails_in_a_transform_of_nnx_is_named(how):
    step = getattr(Transforming(), how)
    with pytest.raises(CapturedError, match=r"reaches \['self.model'\]"):
        pipeline().scan(step, 2)
    step = getattr(Transforming(), how)  # NNX has taken the attributes off the model
    with pytest.raises(StageError, match=r"takes \['self.model'\] from outside"):
        pipeline(lambda batch: {"x": step(batch)})


@pytest.mark.spec("SCAN-018")
def test_what_an_earlier_failure_has_emptied_is_not_blamed_for_another():
    trainer = Transforming()
    trainer.first = lambda batch: nnx.jit(lambda model: model.w[...])(trainer.unused)
    for step, name in ((trainer.first, "trainer.unused"), (trainer.count, "self.model")):
        with pytest.raises(CapturedError) as error:
            pipeline().scan(step, 2)
        assert error.value.names == [name]


class PerExample:
    def __init__(self):
        self.model, self.average = Model(), Model()

    def step(self, model, batch):
        return jax.vmap(lambda x: nnx.grad(lambda model: model.w[...] * x)(model).w[...])(
            batch["x"]
        )

    def misfit(self, model, batch):
        return self.attend(batch["x"][:, None])

    def refuse(self, model, batch):
        raise ValueError("a different trace level of logging")


@pytest.mark.spec("SCAN-018")
def test_who_fails_over_what_was_given_blames_nothing_else():
    trainer = PerExample()
    trainer.attend = nnx.MultiHeadAttention(2, in_features=4, decode=False, rngs=nnx.Rngs(0))
    for step, words in (
        (trainer.misfit, "Incompatible input dimension"),
        (trainer.step, "Cannot extract graph node"),
        (trainer.refuse, "of logging"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            pipeline().scan(step, 2, modules=[trainer.model])
        assert not isinstance(error.value, CapturedError)


class Anchored:
    """Keeps the arrays that a model, a source and a state began with."""

    def __init__(self):
        self.model, self.x = Model(), jnp.arange(4, dtype=jnp.float32)
        self.w = self.model.w[...]
        self.source = MemorySource(MemorySourceConfig(), {"x": self.x})

    def step(self, model, batch):
        return model(batch)["x"].sum() - (self.w * self.x).sum()

    def stage(self, batch):
        return {"x": batch["x"] - self.x.mean()}


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_an_array_that_is_held_by_itself_is_the_users_own():
    anchored = Anchored()
    stream = Pipeline(source=anchored.source, stages=[anchored.stage], batch_size=4)
    losses = stream.scan(anchored.step, 2, modules=[anchored.model])
    assert losses.tolist() == [-12, -12]


class Hostile:
    """Lets nobody look at it."""

    def __getattribute__(self, name):
        raise LookupError(name)


class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise ModuleNotFoundError(name)


class Held:
    def __init__(self):
        self.hostile, self.lazy, self.made = Hostile(), Lazy("lazy"), weakref.proxy(Model())
        self.registry = {i: [i] for i in range(1000)}

    def stage(self, batch):
        return {"x": batch["x"] + jnp.ones(4)}


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_cannot_be_looked_at_is_passed_over():
    held, done = Held(), threading.Event()

    def write():
        while not done.is_set():
            held.registry[object()] = []
            held.registry.popitem()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            assert captured(held.stage, [jnp.ones(4)]) == []
        pipeline(held.stage)
    finally:
        done.set()
        writer.join()


class GradientOfNorm:
    def __init__(self):
        self.model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))

    def step(self, model, batch):
        return jax.grad(lambda x: model(x).sum())(batch["x"][:, None]).sum()


@pytest.mark.spec("SCAN-018")
def test_an_error_of_flax_about_a_module_that_was_given_stays_what_it_is():
    trainer = GradientOfNorm()
    for model in (trainer.model, nnx.clone(trainer.model)):
        with pytest.raises(TraceContextError):
            pipeline().scan(trainer.step, 2, modules=[model])


class WithModel(eqx.Module):
    model: Model
    scale: jax.Array

    def __call__(self, batch):
        return self.model(batch)


@pytest.mark.spec("ERR-032")
def test_a_module_of_equinox_that_has_one_of_nnx_is_refused():
    with pytest.raises(StageError, match=r"takes \['self.model'\] from outside"):
        pipeline(WithModel(Model(), jnp.ones(())))


@pytest.mark.spec("SCAN-018", "ERR-032")
def test_what_is_given_openly_is_accepted():
    model = Model()
    doubled = pipeline(model).scan(lambda batch: batch["x"], 2)
    given = pipeline().scan(lambda model, batch: model(batch)["x"], 2, modules=[model])
    np.testing.assert_array_equal(doubled, given)
    model.w[...] = jnp.float32(0)
    assert not pipeline(model.__call__).step()["x"].any()
