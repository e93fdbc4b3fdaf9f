"""Every epoch is a permutation: the one that the spec writes down, on every platform."""

import hashlib

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model, vectors
from hypothesis import example, given, settings, strategies as st

from datarax import _keys
from datarax._order import (
    ORDERS,
    ROUNDS,
    Permutation,
    StoredOrder,
    Stretch,
    SwapOrNot,
    keys_of as _keys_of,
    word,
)

LENGTHS = sorted(int(n.split("/")[1][:-5]) for n in vectors.manifest() if n.startswith("order/"))


def order_key(seed):
    return _keys.node_key(np.array([0, seed], np.uint32), "source")


def epoch_keys(base, epoch, span):
    return _keys_of(base, epoch + jnp.arange(span, dtype=epoch.dtype))


def keys_of(seed, epoch, span=1):
    """The keys of the orders of some epochs in a row."""
    return epoch_keys(order_key(seed), jnp.asarray(np.uint32(epoch)), span)


def offsets(values, length):
    return jnp.asarray(np.asarray(values, word(length)))


def epoch_of(seed, epoch, length):
    """The records of a whole epoch."""
    return SwapOrNot(keys_of(seed, epoch), length)(offsets(range(length), length))


@pytest.mark.spec("SHUF-001", "SHUF-012", "SHUF-013")
@pytest.mark.parametrize("length", [n for n in LENGTHS if n < 2**32])
def test_the_order_reproduces_its_vectors(length):
    # Stored states outlive a release: with other numbers they would resume at other records.
    stored = vectors.load(f"order/{length}.json")
    order = jax.jit(lambda keys, x: SwapOrNot(keys, length)(x))
    for case in stored["cases"]:
        keys = keys_of(case["seed"], case["epoch"])
        if length > vectors.DIGESTED:
            assert order(keys, offsets(case["offsets"], length)).tolist() == case["records"]
            continue
        epoch = np.asarray(order(keys, offsets(range(length), length)))
        assert epoch[case.get("offsets", slice(None))].tolist() == case["records"]
        assert (np.bincount(epoch, minlength=length) == 1).all()
        if "sha256" in case:
            assert hashlib.sha256(epoch.astype("<u4").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.spec("SHUF-012", "SHUF-014")
@pytest.mark.parametrize("length", [n for n in LENGTHS if n >= 2**32])
def test_the_order_of_more_than_2_to_the_32_records_reproduces_its_vectors(length):
    stored = vectors.load(f"order/{length}.json")
    with jax.enable_x64(True):
        for case in stored["cases"]:
            order = SwapOrNot(keys_of(case["seed"], case["epoch"]), length)
            records = order(offsets(case["offsets"], length))
            assert records.tolist() == case["records"]
            assert order.inverse(records).tolist() == case["offsets"]


@pytest.mark.spec("SHUF-001", "SHUF-013")
@pytest.mark.parametrize("lengths", [range(1, 101), range(101, 201), range(201, 301)], ids=str)
def test_every_length_up_to_300_is_permuted_as_in_the_model(lengths):
    places = np.arange(300)
    for length in lengths:
        key = model.epoch_key(model.base_key(42), length % 3)
        expected = model.order(key, length, range(length)).tolist()
        assert sorted(expected) == list(range(length))
        epoch = np.array([length % 3], np.uint32)
        on_host = SwapOrNot(_keys_of(order_key(42), epoch), length)
        found = on_host._rounds(np.arange(length, dtype=np.uint32), None, reverse=False)
        assert found.tolist() == expected
        if length % 20 == 0:
            with jax.disable_jit():  # one shape for all lengths, and nothing to compile for each
                order = SwapOrNot(keys_of(42, length % 3), length)
                found = order(offsets(places % length, length))[:length]
            assert found.tolist() == expected


@pytest.mark.spec("SHUF-015")
@pytest.mark.parametrize("length", [1, 2, 33, 2**16 + 1])
def test_the_inverse_gives_the_offset_of_each_record(length):
    order = SwapOrNot(keys_of(5, 7), length)
    every = offsets(range(length), length)
    assert (order.inverse(order(every)) == every).all()
    assert (order(order.inverse(every)) == every).all()


@pytest.mark.spec("SHUF-003", "SHUF-007", "SHUF-008", "SHUF-009")
@pytest.mark.parametrize("length", [33, 1000])
def test_no_two_orders_of_different_epochs_or_seeds_are_equal(length):
    seeds = [0, 1, 2, 3, 42, 1000, 2**16, 2**31 - 1, 2**31, 2**31 + 42, 2**32 - 2, 2**32 - 1]
    epochs = [*range(10), 2**31, 2**32 - 1]
    keys = jnp.concatenate([keys_of(s, e) for s in seeds for e in epochs])
    every = offsets(range(length), length)
    orders = np.asarray(jax.vmap(lambda key: SwapOrNot(key[None], length)(every))(keys))
    assert len(orders) * (len(orders) - 1) // 2 > 10**4
    assert len({order.tobytes() for order in orders}) == len(orders)


@pytest.mark.spec("SHUF-010")
@pytest.mark.parametrize("length", [20_000, 10**6, 10**9])
def test_neighbours_are_strangers(length):
    for seed in range(5):
        order = SwapOrNot(keys_of(seed, 0), length)
        records = np.asarray(order(offsets(range(10_001), length)), np.int64)
        share = (np.abs(np.diff(records)) < length / 100).mean()
        assert 0.01 < share < 0.03


@pytest.mark.spec("SHUF-017")
@settings(max_examples=10)
@given(
    st.sampled_from([1, 2, 10, 33]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
@example(33, 2**32 - 1, 2**32 - 1)
def test_the_order_is_the_same_eagerly_compiled_and_mapped(length, seed, epoch):
    every = offsets(range(length), length)
    traced = jnp.asarray(np.uint32(epoch))
    base = order_key(seed)
    with jax.disable_jit():
        eager = SwapOrNot(epoch_keys(base, traced, 1), length)(every)
    assert _compiled(length)(base, traced, every).tolist() == eager.tolist()
    one_by_one = _mapped(length)(base, traced, every)
    assert one_by_one.tolist() == eager.tolist()


def _order(length):
    return lambda base, epoch, x: SwapOrNot(epoch_keys(base, epoch, 1), length)(x)


_programs = {}


def _compiled(length):
    return _programs.setdefault(length, jax.jit(_order(length)))


def _mapped(length):
    def one_by_one(base, epoch, every):
        return jax.vmap(lambda x: _order(length)(base, epoch, x[None])[0])(every)

    return _programs.setdefault((length, "mapped"), jax.jit(one_by_one))


@pytest.mark.spec("SHUF-003", "SHUF-013")
@pytest.mark.parametrize("kind", [True, "permutation"])
def test_a_span_of_epochs_has_the_order_of_each(kind):
    length, span = 11, 4
    together = ORDERS[kind](keys_of(3, 5, span), length)
    turns = jnp.asarray(np.repeat(np.arange(span, dtype=np.uint32), length))
    every = offsets(np.tile(np.arange(length), span), length)
    alone = [ORDERS[kind](keys_of(3, 5 + i), length)(every[:length]) for i in range(span)]
    assert together(every, turns).tolist() == jnp.concatenate(alone).tolist()


@pytest.mark.spec("SHUF-016")
@pytest.mark.parametrize("length", [1, 10, 257])
def test_permutation_is_that_of_jax(length):
    key = jax.random.fold_in(_keys.typed(order_key(42)), 6)
    expected = jax.random.permutation(key, length)
    order = Permutation(keys_of(42, 6), length)
    assert order(offsets(range(length), length)).tolist() == expected.tolist()
    assert order.length == length


@pytest.mark.internal("what a loop looks up instead of computing it for each batch")
@pytest.mark.parametrize("kind", [True, "blocks"])
@pytest.mark.parametrize("start", [0, 3, 96, 2**32 - 30])
def test_a_stretch_is_the_order_from_a_place_on(kind, start):
    length = 2**32 - 20 if start > 100 else 100
    order = ORDERS[kind](keys_of(1, 2), length)
    stretch = Stretch(order, jnp.uint32(start), 8)
    there = offsets(range(start, min(start + 8, length)), length)
    assert stretch(there).tolist() == order(there).tolist()
    assert stretch.length == length


@pytest.mark.internal("what is counted on the host for several epochs at once")
@pytest.mark.parametrize("length", [1, 10, 2**32 - 20, 2**40])
def test_the_words_of_some_epochs_give_their_orders(length):
    kind = word(length)
    with jax.enable_x64(length >= 2**32):
        several = SwapOrNot(_keys_of(order_key(3), np.arange(5, 11, dtype=kind)), length)
        assert isinstance(several.pivots, np.ndarray) and several.pivots.dtype == kind
        some = jax.tree.map(lambda x: x[:, 2:5], several)
        first = offsets(range(min(length, 8)), length)
        turn = jnp.ones_like(first)
        counted = SwapOrNot(epoch_keys(order_key(3), jnp.asarray(7, kind), 3), length)
        assert some(first).tolist() == counted(first).tolist()
        assert some(first, turn).tolist() == counted(first, turn).tolist()
        assert some.inverse(some(first)).tolist() == first.tolist()


@pytest.mark.spec("SHUF-017")
def test_an_order_that_is_traced_takes_offsets_of_the_host(unchecked):
    places = np.arange(10, dtype=np.uint32)
    found = jax.jit(lambda keys: SwapOrNot(keys, 10)(places))(keys_of(1, 2))
    assert found.tolist() == epoch_of(1, 2, 10).tolist()


@pytest.mark.spec("SHUF-002")
def test_the_stored_order_is_the_stored_order():
    every = offsets([3, 0, 2, 2], 5)
    assert StoredOrder(None, 5)(every).tolist() == [3, 0, 2, 2]
    assert StoredOrder(keys_of(1, 2), 5)(every, every).tolist() == [3, 0, 2, 2]


@pytest.mark.spec("SHUF-013")
def test_an_order_refuses_offsets_that_would_wrap():
    order = SwapOrNot(keys_of(0, 0), 10)
    with pytest.raises(TypeError) as error:
        order(jnp.arange(3, dtype=jnp.uint8))
    assert str(error.value) == "An order of 10 records takes offsets of type uint32, got uint8."


@pytest.mark.internal
def test_the_first_record_of_a_billion_needs_no_memory_for_the_others():
    keys = keys_of(0, 0)
    program = jax.make_jaxpr(lambda x: SwapOrNot(keys, 10**9)(x))(offsets(range(8), 10**9))
    sizes = [v.aval.size for eqn in _equations(program.jaxpr) for v in eqn.outvars]
    assert max(sizes) <= 2 * ROUNDS * 8


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.mark.internal("why a block shuffle has a way of its own for rows in a row")
def test_rows_in_a_row_share_the_round_keys_of_their_window():
    order, count = ORDERS["blocks"](keys_of(0, 0), 10**6), 4096

    def ciphers(function, x):
        """From how many keys or counters round words are derived: only threefry rotates words."""
        eqns = _equations(jax.make_jaxpr(function)(x).jaxpr)
        return max(e.outvars[0].aval.size for e in eqns if e.primitive.name == "shift_left")

    assert ciphers(order, offsets(range(count), 10**6)) == count
    assert ciphers(lambda start: order.run(start, count), jnp.uint32(5)) <= count // 50


@pytest.mark.internal
def test_a_word_holds_every_offset():
    assert [word(n) for n in (1, 2**32 - 1, 2**32)] == [np.uint32, np.uint32, np.uint64]


@pytest.mark.internal("XLA compiles for a device, and each has traps of its own")
@pytest.mark.parametrize("cpu", [True, False])
def test_rounds_are_a_loop_on_the_cpu_alone(monkeypatch, cpu):
    monkeypatch.setattr("datarax._order.on_cpu", lambda: cpu)
    order, offsets = (
        SwapOrNot(_keys_of(np.zeros(2, np.uint32), jnp.array([3], jnp.uint32)), 1000),
        jnp.arange(1000),
    )

    def run(offsets):  # traced anew each time
        return order(offsets.astype(jnp.uint32))

    assert (" while(" in jax.jit(run).lower(offsets).compile().as_text()) == cpu
    assert jax.jit(run)(offsets).tolist() == order(offsets.astype(jnp.uint32)).tolist()
    assert sorted(jax.jit(run)(offsets).tolist()) == list(range(1000))
