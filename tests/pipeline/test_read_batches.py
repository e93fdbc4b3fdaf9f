"""Which rows are read for a batch."""

import numpy as np
import pytest
from flax import nnx

from datarax import Pipeline
from datarax.pipeline import _read_batches
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig


def records_of(length, shuffle):
    """What a pipeline asks for the records at any place."""
    config = RandomAccessSourceConfig(shuffle=shuffle)
    source = RandomAccessSource(config, list(np.arange(length)))
    pipeline = Pipeline(source=source, batch_size=1, rngs=nnx.Rngs(0))
    pipeline._runtime.look(pipeline)
    ahead = pipeline._runtime.read_ahead(pipeline)
    assert ahead is not None
    return ahead._rows._records


@pytest.mark.internal
@pytest.mark.parametrize("shuffle", [False, True])
def test_blocks_of_an_order_join_to_the_whole(shuffle, monkeypatch):
    whole = records_of(35, shuffle).at(0, 0, 35)
    assert sorted(whole) == list(range(35))
    monkeypatch.setattr(_read_batches, "BLOCK", 10)
    records = records_of(35, shuffle)
    for offset in range(35):
        for count in (1, 3, 35):
            got = records.at(0, offset, min(count, 35 - offset))
            np.testing.assert_array_equal(got, whole[offset : offset + count])


@pytest.mark.internal
def test_the_order_of_what_follows_is_computed_before_it_is_needed(monkeypatch):
    started = []

    def records_from(order, first, count):
        started.append(int(first))
        return compute(order, first, count)

    compute = _read_batches._records_of
    monkeypatch.setattr(_read_batches, "BLOCK", 10)
    monkeypatch.setattr(_read_batches, "_records_of", records_from)
    records = records_of(35, True)
    records.at(0, 0, 5)
    assert started == [0]  # a single batch needs no more
    records.at(0, 5, 5)
    assert started == [0, 10]
    for offset in range(10, 35, 5):
        records.at(0, offset, 5)
    assert started == [0, 10, 20, 25]
