"""`in_own_branch`, `beside` and `as_one_program` change no result."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax._xla import SIDE_BY_SIDE, as_one_program, beside, in_own_branch

pytestmark = pytest.mark.internal("XLA compiles for a device, and each has traps of its own")


def outcome(x, y):
    keys = jax.random.split(jax.random.key(3), 2)
    return {"product": x * y, "whole": jnp.int8(7), "keys": keys, "none": None}


def test_it_gives_what_the_function_gives():
    x, y = jnp.arange(3.0), jnp.float32(2)
    for run in (in_own_branch, jax.jit(in_own_branch, static_argnums=1)):
        found = run(jnp.uint32(5), outcome, x, y)
        assert jax.tree.structure(found) == jax.tree.structure(outcome(x, y))
        assert found["product"].tolist() == [0, 2, 4] and found["whole"] == 7
        assert (
            jax.random.key_data(found["keys"]) == jax.random.key_data(outcome(x, y)["keys"])
        ).all()


@pytest.mark.parametrize("kind", [np.uint32, np.uint8])
def test_every_number_but_the_largest_takes_the_branch(kind):
    @jax.jit
    def run(number):
        return in_own_branch(number, lambda: jnp.int32(1))

    most = np.iinfo(kind).max
    assert [int(run(jnp.asarray(x, kind))) for x in (0, 1, most - 1)] == [1, 1, 1]


def test_gradients_and_maps_go_through():
    def loss(x, number):
        return in_own_branch(number, lambda x: (x * x).sum(), x)

    assert jax.grad(loss)(jnp.arange(3.0), jnp.uint32(1)).tolist() == [0, 2, 4]
    mapped = jax.vmap(loss)(jnp.ones((2, 3)), jnp.arange(2, dtype=jnp.uint32))
    assert mapped.tolist() == [3, 3]


def test_on_the_cpu_it_is_a_branch_of_its_own():
    text = (
        jax.jit(lambda n, x: in_own_branch(n, jnp.sin, x))
        .lower(jnp.uint32(0), jnp.ones(3))
        .compile()
        .as_text()
    )
    assert " conditional(" in text


def test_outside_of_a_program_it_is_run_as_it_is_written():
    assert in_own_branch(jnp.uint32(0), lambda x: float(x) + 1, jnp.ones(())) == 2


@pytest.mark.skipif(not SIDE_BY_SIDE or (os.cpu_count() or 1) < 2, reason="nothing runs beside")
def test_a_program_does_not_wait_for_one_that_it_is_beside():
    @jax.jit
    def work(turns):
        return jax.lax.fori_loop(0, turns, lambda _, x: jnp.cos(x @ x), jnp.eye(64)).sum()

    jax.block_until_ready(work(1))
    with beside(1):
        long = work(20_000)
    with beside(2):
        short = work(1)
    jax.block_until_ready(short)
    assert not long.is_ready()


def test_outside_of_any_trace_a_function_is_one_program():
    traced = []

    def double(x, times):
        traced.append(isinstance(x, jax.core.Tracer))
        return x * times

    assert [int(as_one_program(double, jnp.int32(i), times=2)) for i in range(3)] == [0, 2, 4]
    assert int(as_one_program(double, jnp.int32(1), times=3)) == 3
    assert traced == [True, True]
    on_host = as_one_program(double, np.arange(3), times=2)
    assert isinstance(on_host, np.ndarray) and on_host.tolist() == [0, 2, 4]
    program = jax.make_jaxpr(lambda x: as_one_program(double, x, times=2))(jnp.int32(1))
    assert [equation.primitive.name for equation in program.eqns] == ["mul"]
