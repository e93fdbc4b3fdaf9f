"""Buffers are reused, but never while an array holds them."""

import jax
import numpy as np
import pytest
from flax import nnx

from datarax import Pipeline
from datarax._host_memory import aligned
from datarax.sources import (
    StreamingDiskSource,
    StreamingDiskSourceConfig,
    _buffers,
)


@pytest.mark.internal
@pytest.mark.parametrize("width", [1, 1000], ids=["small", "large"])
def test_rows_are_where_jax_takes_them_over_without_a_copy(width):
    def rows():
        return [_buffers.empty_rows(100, (width,), np.int32) for _ in range(5)]

    held, cpu = rows(), jax.local_devices(backend="cpu")[0]
    del held[1], held[2]
    for x in held + rows():  # new memory, and reused memory
        assert x.shape == (100, width)
        assert jax.device_put(x, cpu).unsafe_buffer_pointer() == x.ctypes.data


@pytest.mark.spec("SRC-009")
@pytest.mark.parametrize("width", [1, 1000], ids=["small", "large"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stages", [[], [dict]], ids=["bare", "staged"])
def test_a_batch_is_not_a_buffer(tmp_path, width, shuffle, stages):
    data = np.repeat(np.arange(2000, dtype=np.int32)[:, None], width, axis=1)
    np.save(tmp_path / "x.npy", data)
    source = StreamingDiskSource(
        StreamingDiskSourceConfig(path=tmp_path / "x.npy", shuffle=shuffle)
    )
    pipeline = Pipeline(source=source, stages=stages, batch_size=100, rngs=nnx.Rngs(0))
    rows, kept, views = [], [], []
    for i, batch in enumerate(pipeline):
        rows.append(np.array(batch["data"][:, 0]))
        if i % 3 == 0:  # frees the memory of the others
            kept.append((i, batch))
        if i % 3 == 1:
            views.append((i, np.asarray(batch["data"])[10:20]))
    assert sorted(np.concatenate(rows)) == list(range(2000))
    for i, batch in kept:
        np.testing.assert_array_equal(batch["data"], data[rows[i]])
    for i, view in views:
        np.testing.assert_array_equal(view, data[rows[i][10:20]])
    pipeline.seek(epoch=0)
    scanned = pipeline.scan(lambda batch: batch["data"], 20)
    np.testing.assert_array_equal(scanned, data[np.array(rows)])


@pytest.mark.internal
def test_memory_of_batches_that_are_gone_is_used_again(tmp_path, monkeypatch):
    made = []

    def counted(count):
        made.append(count)
        return aligned(count)

    # A sparse file, which reads as zeros: 40 batches of 2 MB.
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.int32, (20_000, 1000))
    config = StreamingDiskSourceConfig(path=tmp_path / "x.npy")
    pipeline = Pipeline(source=StreamingDiskSource(config), batch_size=500, num_threads=1)
    monkeypatch.setattr(_buffers, "aligned", counted)
    for batch in pipeline:
        jax.block_until_ready(batch)
    assert 0 < len(made) <= 10
