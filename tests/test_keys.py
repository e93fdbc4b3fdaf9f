"""All keys are derived from (seed, node, epoch, record), with one cipher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import vectors
from flax import nnx
from hypothesis import given, strategies as st

from datarax import _keys
from datarax.errors import RngsError

WORD = st.integers(0, 2**32 - 1)


def u32(*values):
    return jnp.asarray(np.array(values, np.uint32))


def scalar(value):
    """An integer in the word that holds it."""
    return jnp.asarray(np.uint32(value) if value < 2**32 else np.uint64(value))


@pytest.mark.spec("KEYS-001")
def test_the_cipher_reproduces_its_vectors():
    for case in vectors.load("keys/threefry.json")["cases"]:
        high, low = u32(*case["count"])
        assert _keys.threefry2x32(u32(*case["key"]), high, low).tolist() == case["words"]


@pytest.mark.spec("KEYS-003")
def test_folding_reproduces_its_vectors():
    for case in vectors.load("keys/fold_in.json")["cases"]:
        with jax.enable_x64(case["number"] >= 2**32):
            folded = _keys.fold_in(u32(*case["key"]), scalar(case["number"]))
        assert folded.tolist() == case["words"], case


@pytest.mark.spec("KEYS-003")
@given(WORD, WORD, WORD)
def test_folding_is_that_of_jax_below_2_to_the_32(first, second, number):
    key = u32(first, second)
    folded = jax.random.fold_in(_keys.typed(key), scalar(number))
    assert _keys.fold_in(key, scalar(number)).tolist() == jax.random.key_data(folded).tolist()


@pytest.mark.spec("KEYS-001", "KEYS-003")
@given(st.tuples(WORD, WORD), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_the_host_counts_the_keys_that_a_device_counts(key, numbers):
    key = np.array(key, np.uint32)
    with jax.enable_x64(True):
        for kind in np.uint32, np.uint64:
            cast = np.array(numbers, np.uint64).astype(kind)
            for value in cast, cast[0, ...]:  # the second without an axis
                assert isinstance(value, np.ndarray)
                words = _keys.split_word(value)
                here = _keys.threefry2x32(key, *words)
                there = _keys.threefry2x32(*map(jnp.asarray, (key, *words)))
                assert isinstance(here, np.ndarray) and isinstance(there, jax.Array)
                assert here.dtype == np.uint32 and here.tolist() == there.tolist()
    node = _keys.node_key(key, "a")
    assert isinstance(node, np.ndarray)
    assert node.tolist() == _keys.node_key(jnp.asarray(key), "a").tolist()


@pytest.mark.spec("KEYS-002", "KEYS-004", "KEYS-005", "KEYS-006")
def test_the_chain_from_a_seed_to_a_record_reproduces_its_vectors():
    for case in vectors.load("keys/chain.json")["cases"]:
        base = _keys.base_words(nnx.Rngs(case["seed"]), None)
        node = _keys.node_key(base, case["node"])
        assert node.tolist() == case["node_key"], case
        epoch = scalar(case["epoch"])
        assert _keys.fold_in(node, epoch).tolist() == case["epoch_key"], case
        with jax.enable_x64(case["record"] >= 2**32):
            keys = _keys.record_keys(node, epoch[None], scalar(case["record"])[None])
            assert jax.random.key_data(keys).tolist() == [case["record_key"]], case


@pytest.mark.spec("KEYS-006")
def test_the_keys_of_rows_are_those_of_each_row():
    node = u32(1, 2)
    epochs, records = u32(0, 0, 7, 2**32 - 1), u32(0, 5, 5, 2**32 - 1)
    together = _keys.record_keys(node, epochs, records)
    for i in range(4):
        alone = jax.random.fold_in(jax.random.fold_in(_keys.typed(node), epochs[i]), records[i])
        assert (jax.random.key_data(together[i]) == jax.random.key_data(alone)).all()


@pytest.mark.spec("KEYS-007")
def test_the_key_of_a_batch_counts_epoch_and_offset():
    node = u32(1, 2)
    expected = jax.random.fold_in(jax.random.fold_in(_keys.typed(node), 3), 4)
    got = _keys.batch_key(node, scalar(3), scalar(4))
    assert jax.random.key_data(got).tolist() == jax.random.key_data(expected).tolist()


@pytest.mark.spec("KEYS-002")
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1, 2**31, 2**32 - 1])
def test_the_base_of_a_seed_has_all_its_32_bits(seed):
    assert _keys.base_words(nnx.Rngs(seed), None).tolist() == [0, seed]


@pytest.mark.spec("KEYS-010")
def test_a_named_stream_goes_before_the_default_one():
    rngs = nnx.Rngs(1, shuffle=2)
    assert _keys.base_words(rngs, "shuffle").tolist() == [0, 2]
    assert _keys.base_words(rngs, "augment").tolist() == [0, 1]
    assert _keys.base_words(rngs, None).tolist() == [0, 1]
    assert {k: v.tolist() for k, v in _keys.all_words(rngs).items()} == {
        "default": [0, 1],
        "shuffle": [0, 2],
    }


@pytest.mark.spec("KEYS-010", "ERR-030")
def test_rngs_without_a_stream_that_counts_are_refused():
    with pytest.raises(RngsError) as error:
        _keys.base_words(nnx.Rngs(params=0), "shuffle")
    assert str(error.value) == (
        "`rngs` must have a stream 'shuffle' or 'default', got streams ['params']. "
        "Build it as nnx.Rngs(seed)."
    )


@pytest.mark.spec("KEYS-011")
def test_reading_a_stream_does_not_draw_from_it():
    rngs = nnx.Rngs(0, shuffle=1)
    _keys.base_words(rngs, "shuffle"), _keys.all_words(rngs)
    assert [stream.count[...].tolist() for _, stream in rngs.items()] == [0, 0]


@pytest.mark.spec("KEYS-012")
def test_a_key_of_another_generator_counts_by_its_first_two_words():
    key = jax.random.wrap_key_data(u32(1, 2, 3, 4), impl="rbg")
    assert _keys.base_words(nnx.Rngs(key), None).tolist() == [1, 2]
    assert _keys.words(key).tolist() == [1, 2]


@pytest.mark.spec("KEYS-001")
def test_the_default_generator_does_not_count():
    node, index = u32(3, 4), u32(5, 6)
    expected = jax.random.key_data(_keys.record_keys(node, index, index)).tolist()
    with jax.default_prng_impl("rbg"):
        keys = _keys.record_keys(node, index, index)
        assert jax.random.key_data(keys).tolist() == expected


@pytest.mark.internal
def test_words_are_split_high_first():
    assert [int(x) for x in _keys.split_word(jnp.uint32(5))] == [0, 5]
    assert [int(x) for x in _keys.split_word(jnp.uint8(5))] == [0, 5]
    with jax.enable_x64(True):
        assert [int(x) for x in _keys.split_word(jnp.uint64((7 << 32) | 9))] == [7, 9]
