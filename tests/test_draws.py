"""Programs with inlined rounds of threefry draw the bits that JAX draws."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from datarax._draws import with_inlined_threefry

pytestmark = pytest.mark.internal("on a CPU, JAX's own loop takes longer than a small batch")

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


def keys_of(shape, impl="threefry2x32"):
    return jax.random.split(jax.random.key(7, impl=impl), shape)


def data(tree):
    """Arrays that NumPy can compare."""
    typed = jax.dtypes.prng_key
    return jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, typed) else x, tree
    )


def assert_same(function, *args):
    expected, found = (data(jax.jit(f)(*args)) for f in (function, with_inlined_threefry(function)))
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (x.dtype, x.weak_type) == (y.dtype, y.weak_type)
        np.testing.assert_array_equal(x, y)


def loops(function, *args):
    return jax.jit(function).lower(*args).as_text().count("stablehlo.while")


@settings(max_examples=10)
@given(SHAPES, SHAPES, st.sampled_from([jnp.uint8, jnp.uint16, jnp.uint32]), st.integers(1, 3))
def test_the_bits_are_those_of_jax(batch, shape, dtype, parts):
    def draw(key):
        numbers = jnp.arange(parts, dtype=jnp.uint32)
        folded = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        return jax.random.bits(key, shape, dtype), jax.random.split(key, (parts, 2)), folded

    function = draw
    for _ in batch:
        function = jax.vmap(function)
    assert_same(function, keys_of(batch) if 0 not in batch else keys_of((1,))[:0].reshape(batch))


def nested(key, x):
    """Draws wherever a program calls another one."""
    within = jax.lax.cond(x > 0, jax.random.normal, lambda key: x, key)
    step = lambda key, _: (jax.random.fold_in(key, 1), jax.random.bits(key))  # noqa: E731
    key, drawn = jax.lax.scan(step, key, None, 3)
    return within, drawn, jax.nn.relu(jax.random.normal(key))


def others(key, x):
    """Draws in other kinds of programs, some of which are not rewritten."""
    unlucky = lambda key: jax.random.uniform(key) < 0.9  # noqa: E731
    last = jax.lax.while_loop(unlucky, lambda key: jax.random.split(key)[1], key)
    again = jax.checkpoint(jax.random.normal)(key)
    solved, _ = jax.scipy.sparse.linalg.cg(lambda v: v + 0 * jax.random.normal(key), x)
    return last, again, solved, jax.random.choice(key, 10, (4,), replace=False)


@pytest.mark.parametrize("function", [nested, others])
@pytest.mark.parametrize("partitionable", [False, True])
def test_draws_in_programs_that_are_called_are_those_of_jax(function, partitionable):
    with jax.threefry_partitionable(partitionable):
        assert_same(function, jax.random.key(3), jnp.float32(1))
        assert_same(jax.vmap(function), keys_of((4,)), jnp.array([-1.0, 0, 1, 2]))


def test_no_loop_is_left():
    assert loops(nested, jax.random.key(3), jnp.float32(1)) > 1
    assert loops(with_inlined_threefry(nested), jax.random.key(3), jnp.float32(1)) == 1  # the scan


def test_bits_of_64_are_those_of_jax():
    with jax.enable_x64(True):
        assert_same(lambda key: jax.random.bits(key, (3,), jnp.uint64), jax.random.key(3))


def test_old_keys_are_keys():
    assert_same(lambda key: jax.random.normal(key, (2,)), jax.random.PRNGKey(3))


def test_a_setting_holds_where_it_was_made():
    def function(key):
        with jax.threefry_partitionable(False):
            first = jax.random.split(key)
        with jax.threefry_partitionable(True):
            return first, jax.random.split(key)

    assert_same(function, jax.random.key(3))


def test_what_needs_constants_stays_as_it_is():
    with jax.threefry_partitionable(False):
        assert loops(with_inlined_threefry(jax.random.bits), jax.random.key(3)) == 1
        assert_same(jax.random.bits, jax.random.key(3))


def test_another_generator_stays_as_it_is():
    def function(key):
        return jax.random.normal(key, (3,)), jax.random.split(key), jax.random.fold_in(key, 2)

    assert_same(function, jax.random.key(3, impl="unsafe_rbg"))


SPLIT = """
import jax
from datarax._draws import with_inlined_threefry

def function(keys):
    split = jax.sharding.reshard(keys, jax.P("data"))
    return jax.vmap(lambda key: jax.random.bits(key, (3,)))(split)

with jax.set_mesh(jax.make_mesh((2,), ("data",))):
    keys = jax.random.split(jax.random.key(7), 4)
    expected, found = jax.jit(function)(keys), jax.jit(with_inlined_threefry(function))(keys)
    assert found.sharding.spec[0] == "data" and (found == expected).all()
"""


def test_what_an_explicit_axis_splits_stays_split():
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", SPLIT], check=True, env=flags)


def test_the_rounds_are_not_computed_again_for_every_number_that_hangs_on_them():
    def noise(keys):
        return jax.vmap(jax.random.normal)(keys)[:, None] + jnp.zeros((4, 1000))

    text = jax.jit(with_inlined_threefry(noise)).lower(keys_of((4,))).compile().as_text()
    assert " conditional(" in text


def test_a_program_that_is_called_several_times_stays_one():
    @jax.jit
    def drawn(key):
        return jax.random.normal(key)

    def function(keys):
        return [drawn(key) for key in keys]

    text = jax.jit(with_inlined_threefry(function)).lower(keys_of((3,))).as_text()
    assert text.count("func.func private @drawn") == 1


def test_without_jit_it_runs_line_by_line():
    seen = []

    def function(x):
        seen.append(x)
        return x + 1

    compiled = jax.jit(with_inlined_threefry(jax.jit(function)))
    compiled(jnp.ones(2))
    with jax.disable_jit():
        compiled(jnp.ones(2))
    assert [isinstance(x, jax.core.Tracer) for x in seen] == [True, False]


def test_where_a_nan_comes_from_can_be_found():
    compiled = jax.jit(with_inlined_threefry(jax.jit(lambda x: jnp.log(x) + 1)))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in log"):
        compiled(jnp.float32(-1))
