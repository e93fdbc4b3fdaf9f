"""`shuffle="blocks"`: a permutation, keyed, that reads neighbouring records together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from hypothesis import given, settings, strategies as st

from datarax import Pipeline, _order
from datarax._order import Blocks, BlockShuffle
from datarax.sources import StreamingDiskSource, StreamingDiskSourceConfig

from . import cases

key_of = jnp.array([[3, 4]], jnp.uint32)


def order(length, size, window, offsets, key=key_of, turn=None):
    made = jax.jit(lambda key, *where: Blocks(size, window)(key, length)(*where))
    return np.asarray(made(key, offsets, turn))


@pytest.mark.spec("SHUF-018")
@settings(max_examples=8)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_every_record_stands_once_in_an_epoch(length, size, window):
    offsets = jnp.arange(length, dtype=jnp.uint32)
    assert sorted(order(length, size, window, offsets)) == list(range(length))


@pytest.mark.spec("SHUF-019")
@pytest.mark.parametrize(
    "length, size, window",
    [(10, 3, 2), (1000, 7, 3), (17, 5, 3), (64, 8, 2), (5, 100, 4), (10**9, 1024, 16)],
)
def test_the_order_is_that_of_the_spec(length, size, window):
    key = model.epoch_key(model.base_key(42), 3)
    some = sorted({*range(min(length, 40)), *range(max(0, length - 40), length)})
    words = jnp.asarray(np.array([key], np.uint32))
    found = order(length, size, window, jnp.asarray(some, jnp.uint32), words)
    assert found.tolist() == model.block_order(key, length, size, window, some).tolist()


@pytest.mark.spec("SHUF-019")
def test_lengths_beyond_32_bits():
    length, key = 2**33 + 5, model.epoch_key(model.base_key(1), 0)
    some = [0, 1, 2**32, length - 1]
    with jax.enable_x64(True):
        words = jnp.asarray(np.array([key], np.uint32))
        found = order(length, 1000, 16, jnp.asarray(some, jnp.uint64), words)
    assert found.tolist() == model.block_order(key, length, 1000, 16, some).tolist()


@pytest.mark.spec("SHUF-020")
def test_a_window_touches_one_block_more_than_it_has():
    length, size, window = 10_007, 50, 4
    records = order(length, size, window, jnp.arange(length, dtype=jnp.uint32))
    touched = [
        len(set((records[i : i + size * window] // size).tolist()))
        for i in range(0, length, size * window)
    ]
    assert max(touched) <= window + 1
    assert len({tuple(sorted(records[i : i + 200] // size)) for i in (0, 200, 400)}) == 3


@pytest.mark.spec("SHUF-019")
def test_rows_of_several_epochs_have_each_their_order():
    keys = jnp.array([[3, 4], [5, 6]], jnp.uint32)
    shuffled = BlockShuffle(keys, 103, 8, 2)
    offsets, turn = jnp.arange(103, dtype=jnp.uint32), jnp.arange(103, dtype=jnp.uint32) % 2
    both = np.asarray(shuffled(offsets, turn))
    for i in range(2):
        alone = order(103, 8, 2, offsets, keys[i : i + 1])
        np.testing.assert_array_equal(both[i::2], alone[i::2])


@pytest.mark.spec("SHUF-019")
@pytest.mark.parametrize(
    "length, size, window, count",
    [
        (103, 8, 2, 20),
        (103, 8, 2, 103),
        (60, 1, 7, 9),
        (97, 13, 1, 30),
        (50, 60, 3, 50),
        (9, 2, 2, 1),
    ],
)
def test_rows_in_a_row_are_those_one_by_one(length, size, window, count, monkeypatch):
    monkeypatch.setattr(_order, "PIECE", 4)
    shuffled = BlockShuffle(key_of, length, size, window)
    starts = jnp.arange(length - count + 1, dtype=jnp.uint32)
    found = jax.jit(jax.vmap(lambda start: shuffled.run(start, count)))(starts)
    alone = order(length, size, window, jnp.arange(length, dtype=jnp.uint32))
    np.testing.assert_array_equal(found, np.lib.stride_tricks.sliding_window_view(alone, count))


@pytest.mark.spec("SHUF-019")
def test_rows_in_a_row_beyond_32_bits():
    length, key = 2**33 + 5, model.epoch_key(model.base_key(1), 0)
    start = length - 300
    with jax.enable_x64(True):
        shuffled = BlockShuffle(jnp.asarray(np.array([key], np.uint32)), length, 100, 1)
        found = shuffled.run(jnp.asarray(np.uint64(start)), 300)
    some = [*range(start, length, 23), length - 1]
    expected = model.block_order(key, length, 100, 1, some)
    assert np.asarray(found)[np.array(some) - start].tolist() == expected.tolist()


@pytest.mark.spec("SHUF-018")
def test_a_pipeline_shuffles_by_blocks(tmp_path):
    path = cases.npy_folder(tmp_path)
    config = StreamingDiskSourceConfig(path=path, shuffle="blocks", block_size=4, window=2)
    pipeline = Pipeline(
        source=StreamingDiskSource(config), batch_size=5, rngs=nnx.Rngs(0), last_batch="pad"
    )
    epochs = []
    for _ in range(2):
        batches = [(np.asarray(b["id"]), np.asarray(b["mask"])) for b in pipeline]
        epochs.append(np.concatenate([ids[mask] for ids, mask in batches]).tolist())
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(epoch) == list(range(cases.N))
    assert pipeline.get_state()["fingerprint"]["order"] == "blocks-4x2"


@pytest.mark.spec("SHUF-018")
@pytest.mark.parametrize("config", [{"block_size": 0}, {"window": 0}, {"shuffle": "block"}])
def test_sizes_that_mean_nothing_are_refused(config):
    with pytest.raises((ValueError, TypeError)):
        StreamingDiskSourceConfig(path="x", **config)


@pytest.mark.spec("SHUF-018")
def test_sizes_may_be_integers_of_numpy(unchecked):
    assert Blocks(np.int64(4), np.uint8(2)) == Blocks(4, 2)
    assert type(Blocks(np.int64(4)).size) is int
