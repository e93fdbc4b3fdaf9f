"""The orders of epochs, made ahead of the programs that take them."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import Numbers, ReadOnly, assert_same, pipeline
from hypothesis import given, settings, strategies as st

from datarax import Pipeline
from datarax.pipeline import _orders
from datarax.sources import Blocks, EagerSourceBase


class Turned(Numbers):
    """An order of its own: every epoch is turned by its number."""

    def order(self, order_key, epochs):
        return super().order(order_key, epochs)


def compiled(stream: Pipeline) -> bool:
    """Whether a program was made for the orders of the pipeline."""
    return _orders.order_program.__wrapped__ in stream._runtime._binding.structure.programs


@pytest.mark.internal("a program for it takes longer to compile than the first batch")
@pytest.mark.parametrize(
    "source", [Numbers(31), Numbers(31, shuffle=True), ReadOnly(31)], ids=["stored", "own", "key"]
)
def test_no_program_is_compiled_for_an_order_of_few_words(source):
    stream = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(1))
    stream.step()
    assert not compiled(stream)


@pytest.mark.internal
@pytest.mark.parametrize(
    "source",
    [
        Turned(31, shuffle=True),
        Numbers(31, shuffle=Blocks(4, 2)),
        Numbers(31, shuffle="permutation"),
    ],
    ids=["own", "blocks", "permutation"],
)
def test_for_any_other_order_one_is(source):
    stream = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(1))
    stream.step()
    assert compiled(stream)


@pytest.mark.internal("there it takes longer to count them than to call a program")
@pytest.mark.parametrize("length, compiles", [(16, False), (1, True)])
def test_for_many_epochs_in_a_batch_one_is(length, compiles):
    stream = pipeline(length=length, batch_size=8, seed=1)
    stream.step()
    assert compiled(stream) == compiles


@pytest.mark.spec("SHUF-002", "SHUF-003")
@settings(max_examples=15)
@given(
    st.sampled_from([3, 25, 35]),
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 14, 15, 16, 17, 40, 2**32 - 20]), st.integers(0, 9))
    ),
)
def test_wherever_the_cursor_goes_the_order_is_that_of_the_epoch(batch_size, places):
    def stream(kind: type[EagerSourceBase]) -> Pipeline:
        source = kind(10, shuffle=True)
        return Pipeline(source=source, batch_size=batch_size, rngs=nnx.Rngs(5))

    counted, by_program = stream(Numbers), stream(Turned)
    for epoch, offset in places:
        for each in counted, by_program:
            each.seek(epoch=epoch, offset=offset)
        for _ in range(2):
            assert_same(counted.step(), by_program.step())


@pytest.mark.internal("what was counted with the old one is dropped")
def test_a_changed_key_gives_another_order():
    one, other = (pipeline(length=50, seed=seed, batch_size=50) for seed in (1, 2))
    first, expected = one.step(), other.step()
    one.reset()
    raw = jax.tree.map(lambda x: x, nnx.state(other._base))
    nnx.update(one._base, raw)
    assert_same(one.step(), expected)
    assert np.any(first["id"] != expected["id"])
