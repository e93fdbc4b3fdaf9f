"""An operator is written for one element and mapped over the rows of a batch."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import MODES, assert_same, by_step, pipeline

from datarax import errors
from datarax.operators import (
    Element,
    ElementOperator,
    ElementOperatorConfig,
    OperatorModule,
)


def operator(fn, *, stochastic=False, stream_name=None, **options):
    config = ElementOperatorConfig(stochastic=stochastic, stream_name=stream_name)
    return ElementOperator(config, fn=fn, **options)


# Elements.


@pytest.mark.spec("DAG-022")
def test_an_update_replaces_and_adds_fields_and_keeps_the_others():
    element = Element({"a": 1, "b": 2})
    updated = element.update_data({"b": 3, "c": 4})
    assert updated.data == {"a": 1, "b": 3, "c": 4}
    assert element.data == {"a": 1, "b": 2}
    assert type(updated) is Element


@pytest.mark.spec("DAG-022")
def test_an_element_is_a_value():
    element = Element({"a": jnp.float32(1)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        element.data = {}
    doubled = jax.tree.map(lambda x: x * 2, element)
    assert doubled.data["a"] == 2 and type(doubled) is Element
    assert jax.jit(lambda e: e.update_data({"b": e.data["a"]}))(element).data["b"] == 1


# What an operator sees.


@pytest.mark.spec("DAG-021")
@pytest.mark.parametrize("mode", MODES)
def test_it_is_applied_to_each_row_on_its_own(mode):
    seen = []

    def fn(element, key):
        seen.append((jax.tree.map(jnp.shape, element.data), key))
        return element.update_data({"x": element.data["x"].sum() * 10, "id": element.data["id"]})

    batches = MODES[mode](pipeline([operator(fn)], length=8), 2)
    assert [b["x"].tolist() for b in batches] == [[10, 20, 30, 40], [50, 60, 70, 80]]
    assert all(seen == ({"id": (), "x": ()}, None) for seen in seen)


@pytest.mark.spec("DAG-021", "KEYS-006")
@pytest.mark.parametrize("mode", MODES)
def test_where_it_is_stochastic_it_gets_the_key_of_the_record(mode):
    def fn(element, key):
        return element.update_data({"key": jax.random.key_data(key)})

    stream = pipeline([operator(fn, stochastic=True)], length=8, seed=6)
    batches = MODES[mode](stream, 3)
    node = model.node_key(model.base_key(6), "fn")
    for i, batch in enumerate(batches):
        in_epoch = model.fold_in(node, i // 2)
        expected = np.stack(model.fold_in(in_epoch, np.asarray(batch["id"])), 1)
        assert batch["key"].tolist() == expected.tolist()


@pytest.mark.spec("DAG-021", "STEP-006")
def test_it_sees_nested_fields_and_the_mask():
    def fn(element, key):
        deep = {"mask": element.data["mask"], "x": element.data["x"]}
        return element.update_data({"deep": deep})

    def again(element, key):
        x = jnp.where(element.data["deep"]["mask"], element.data["deep"]["x"], -1)
        return element.update_data({"x": x})

    stream = pipeline([operator(fn), operator(again)], length=3, batch_size=2, last_batch="pad")
    assert [b["x"].tolist() for b in stream] == [[1, 2], [3, -1]]


@pytest.mark.spec("DAG-021", "DAG-001")
def test_it_may_replace_all_fields():
    stream = pipeline([operator(lambda element, key: Element({"y": element.data["x"]}))])
    assert set(stream.step()) == {"y"}


class Scale(nnx.Module):
    def __init__(self):
        self.factor = nnx.Param(jnp.float32(2))

    def apply(self, element, key):
        return element.update_data({"x": element.data["x"] * self.factor[...]})

    __call__ = apply


class EquinoxScale(eqx.Module):
    factor: jax.Array

    def __call__(self, element, key):
        return element.update_data({"x": element.data["x"] * self.factor})


def scaled(factor, element, key):
    return element.update_data({"x": element.data["x"] * factor})


@pytest.mark.spec("DAG-021", "STEP-016", "STEP-017")
@pytest.mark.parametrize(
    "make, name",
    [
        (Scale, "Scale"),
        (lambda: Scale().apply, "apply"),
        (lambda: EquinoxScale(jnp.float32(2)), "EquinoxScale"),
        (lambda: jax.tree_util.Partial(scaled, jnp.float32(2)), "Partial"),
    ],
    ids=["module", "method", "equinox", "partial"],
)
def test_the_arrays_of_its_function_are_its_own(make, name):
    stage = operator(make())
    stream = pipeline([stage], length=4)
    assert list(stream.nodes) == [name]
    for mode in MODES.values():
        assert mode(stream, 1)[0]["x"].tolist() == [2, 4, 6, 8]
    nnx.update(stage, jax.tree.map(lambda x: x * 2, nnx.state(stage, nnx.Param)))
    assert stream.step()["x"].tolist() == [4, 8, 12, 16]
    grads = nnx.grad(lambda s: s.step()["x"].sum(), argnums=nnx.DiffState(0, nnx.Param))(stream)
    assert [g.tolist() for g in jax.tree.leaves(grads)] == [10]


# Operators of one's own.


class Shift(OperatorModule):
    """Has a parameter, a state and, on request, randomness."""

    def __init__(self, amount, **options):
        super().__init__(**options)
        self.amount = nnx.Param(jnp.float32(amount))

    def apply(self, element, key):
        amount = self.amount[...]
        if key is not None:
            amount = amount * jax.random.bernoulli(key).astype(jnp.float32)
        return element.update_data({"x": element.data["x"] + amount})


@pytest.mark.spec("DAG-021", "STEP-016", "STEP-017")
def test_an_operator_module_has_one_method_to_write():
    stage = Shift(10)
    stream = pipeline([stage], length=4)
    for mode in MODES.values():
        assert mode(stream, 1)[0]["x"].tolist() == [11, 12, 13, 14]
    stage.amount[...] = jnp.float32(20)
    assert stream.step()["x"].tolist() == [21, 22, 23, 24]
    grads = nnx.grad(lambda s: s.step()["x"].sum(), argnums=nnx.DiffState(0, nnx.Param))(stream)
    assert [g.tolist() for g in jax.tree.leaves(grads)] == [4]


@pytest.mark.spec("DAG-021", "KEYS-010", "ERR-030")
def test_randomness_has_to_be_asked_for():
    assert Shift(1, rngs=nnx.Rngs(0)).base is None
    assert by_step(pipeline([Shift(1, rngs=nnx.Rngs(0))], length=4), 1)[0]["x"].tolist() == [
        2, 3, 4, 5,
    ]  # fmt: skip
    with pytest.raises(errors.RngsError):
        pipeline([Shift(1, stochastic=True)])
    moved = by_step(pipeline([Shift(1, stochastic=True)], length=64, batch_size=64, seed=0), 1)[0]
    assert 10 < int((moved["x"] > moved["id"].astype(jnp.float32) + 1).sum()) < 54


@pytest.mark.spec("DAG-021")
def test_an_operator_can_be_called_with_a_batch():
    batch = {"x": jnp.array([1.0, 2.0])}
    assert_same(Shift(1)(batch), {"x": jnp.array([2.0, 3.0])})
    keys = jax.random.split(jax.random.key(0), 2)
    Shift(1, stochastic=True)(batch, keys=keys)


@pytest.mark.spec("DAG-021", "ERR-026")
def test_what_is_no_element_is_refused(unchecked):
    for wrong in (lambda e, key: e.data, lambda e, key: None, lambda e, key: e.data["x"]):
        with pytest.raises(errors.StageError, match="An operator must return an element"):
            pipeline([operator(wrong)])


class Counts(nnx.Module):
    def __init__(self):
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, element, key):
        return element.update_data({"x": self.drop(element.data["x"])})


@pytest.mark.spec("DAG-021", "ERR-026")
@pytest.mark.parametrize(
    "fn, said, unsaid",
    [
        (lambda e, key: None, "got NoneType. Is its `return` missing?", "Its key is None"),
        (lambda e, key: Element({"x": None}), "NoneType", "one row at a time"),
        (lambda e: e, "is called as `fn(element, key)`", "Its key is None"),
        (lambda e, key: e["x"], "the fields of the record in `element.data`", "one row at a time"),
        (Counts(), "no Variable can change in it: draw from `key`", "Its key is None"),
    ],
    ids=["no return", "nothing", "one argument", "no dict", "changes"],
)
def test_what_is_wrong_with_an_operator_is_said(unchecked, fn, said, unsaid):
    with pytest.raises(errors.StageError) as error:
        pipeline([operator(fn)])
    assert said in str(error.value) and unsaid not in str(error.value)


@pytest.mark.spec("DAG-021", "DAG-019")
def test_another_function_brings_its_arrays_along():
    class Scale(eqx.Module):
        factor: jax.Array

        def __call__(self, element, key):
            return element.update_data({"x": element.data["x"] * self.factor})

    stage = operator(Scale(jnp.float32(2)))
    made = pipeline([stage])
    stage.fn = Scale(jnp.float32(3))
    assert len(made.get_state()["variables"]) == 1
    assert (
        made.step()["x"].tolist()
        == pipeline([operator(Scale(jnp.float32(3)))]).step()["x"].tolist()
    )


@pytest.mark.internal
def test_a_config_is_a_value():
    config = ElementOperatorConfig(stochastic=True, stream_name="noise")
    assert config == ElementOperatorConfig(stochastic=True, stream_name="noise")
    assert hash(config) == hash(ElementOperatorConfig(stochastic=True, stream_name="noise"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stochastic = False
    made = operator(lambda e, key: e, stochastic=True, stream_name="noise")
    assert made.config == config and made.stochastic and made.stream_name == "noise"
