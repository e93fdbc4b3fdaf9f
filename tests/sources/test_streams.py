"""Streams: the same records in every mode, resumed by skipping."""

import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import itertools
import logging
import pickle
import re
import sqlite3
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import record_words

from datarax import Pipeline
from datarax.errors import (
    EmptySourceError,
    RandomAccessError,
    ReadError,
    RngsError,
    SeekError,
    StateError,
)
from datarax.sources import (
    HFStreamingSource,
    HFStreamingSourceConfig,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    Stream,
    StreamSource,
    StreamSourceConfig,
    TFDSStreamingSource,
    TFDSStreamingSourceConfig,
    _reader,
)
from datarax.sources._conform import copier
from datarax.sources._iterable import Windows
from datarax.testing import check_source

from . import cases
from .cases import N


def records():
    return iter({"id": i} for i in range(N))


def stream(new=records):
    return IterableSource(IterableSourceConfig(), new)


def ids(batches):
    return [np.asarray(batch["id"]).tolist() for batch in batches]


def law(batch_size, last_batch):
    """The batches of one `for` according to chapter 30 of the spec."""
    whole = [[*range(i, min(i + batch_size, N))] for i in range(0, N, batch_size)]
    if last_batch == "drop":
        whole = [batch for batch in whole if len(batch) == batch_size]
    if last_batch == "pad":
        whole[-1] += [0] * (batch_size - len(whole[-1]))
    return whole


@pytest.mark.spec("SRC-027")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_pass_is_an_epoch_and_every_loop_gets_one(last_batch):
    pipeline = Pipeline(source=stream(), batch_size=5, last_batch=last_batch)
    for epoch in range(3):
        assert ids(pipeline) == law(5, last_batch)
        assert pipeline.cursor == (epoch + 1, 0)


@pytest.mark.spec("SRC-027")
def test_a_stream_that_ends_with_a_whole_batch_gives_no_empty_one():
    pipeline = Pipeline(source=stream(lambda: iter({"id": i} for i in range(10))), batch_size=5)
    assert [ids(pipeline) for _ in range(2)] == [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]] * 2


@pytest.mark.spec("SRC-027", "ITER-009")
@pytest.mark.parametrize("size, last_batch", [(5, "keep"), (5, "pad"), (4, "drop")])
def test_an_iterator_made_at_the_end_of_a_pass_is_of_the_next_epoch(size, last_batch):
    def at_the_end():
        source = stream(lambda: iter({"id": i} for i in range(10)))
        pipeline = Pipeline(source=source, batch_size=size, last_batch=last_batch)
        for _ in range(2):
            pipeline.step()
        return pipeline, iter(pipeline)

    pipeline, iterator = at_the_end()
    pipeline.step()  # shows where the pass ended
    assert ids([next(iterator)]) == [[*range(size, 2 * size)]]
    pipeline, iterator = at_the_end()
    pipeline.step()
    pipeline.reset()
    assert ids(iterator) == []
    pipeline, iterator = at_the_end()
    pipeline.reset()  # before the pipeline has met the end of the pass
    assert ids(iterator) == [[*range(size)], [*range(size, 2 * size)]]
    assert pipeline.cursor == (1, 0)


@pytest.mark.spec("SRC-027", "ITER-006")
@pytest.mark.parametrize("size, last_batch", [(5, "keep"), (5, "pad"), (4, "drop")])
def test_a_loop_that_begins_at_the_end_of_a_pass_gets_the_next_one(size, last_batch):
    def pipeline():
        source = stream(lambda: iter({"id": i} for i in range(10)))
        return Pipeline(source=source, batch_size=size, last_batch=last_batch)

    whole = ids(pipeline())
    stepped, left = pipeline(), pipeline()
    for _ in whole:
        stepped.step()
    for _ in zip(whole, left, strict=False):
        pass  # the loop is left with the last batch, and has not seen the end
    for some in stepped, left:
        first, second = iter(some), iter(some)
        assert ids(first) == whole and some.cursor == (2, 0)
        assert ids(second) == []  # an iterator belongs to one epoch
        assert ids(some) == whole


@pytest.mark.spec("SRC-027", "ITER-006")
@pytest.mark.parametrize("size, last_batch", [(5, "keep"), (5, "pad"), (4, "drop")])
def test_a_loop_gets_the_next_pass_where_one_is_known_to_end(size, last_batch):
    source = stream(lambda: iter({"id": i} for i in range(10)))
    pipeline = Pipeline(source=source, batch_size=size, last_batch=last_batch)
    whole = ids(pipeline)
    end = 0, len(whole) * size

    def steps():
        pipeline.reset()
        for _ in whole:
            pipeline.step()

    steps()
    state = pipeline.get_state()
    ways = {
        "step": steps,
        "scan": lambda: (pipeline.reset(), pipeline.scan(lambda batch: batch["id"], len(whole))),
        "seek": lambda: pipeline.seek(epoch=end[0], offset=end[1]),
        "set_state": lambda: pipeline.set_state(state),
    }
    for way, go_there in ways.items():
        pipeline.reset()
        list(pipeline)  # now the pipeline has met the end
        go_there()
        assert pipeline.cursor == end, way
        assert ids(pipeline) == whole and pipeline.cursor == (2, 0), way
        assert ids(pipeline) == whole and pipeline.cursor == (3, 0), way


@pytest.mark.spec("SRC-027")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_step_and_scan_run_on_into_the_next_pass(last_batch):
    a, b = (Pipeline(source=stream(), batch_size=5, last_batch=last_batch) for _ in range(2))
    steps = ids(a.step() for _ in range(12))
    assert np.asarray(b.scan(lambda batch: batch["id"], 12)).tolist() == steps
    assert a.cursor == b.cursor
    whole = law(5, last_batch) if last_batch != "keep" else None
    if whole:
        assert steps == (whole * 3)[:12]
    else:
        assert np.concatenate(steps).tolist() == [i % N for i in range(60)]


@pytest.mark.spec("SRC-027", "SCAN-002")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_what_follows_a_scan_starts_where_the_scan_ended(last_batch):
    a, b, c = (Pipeline(source=stream(), batch_size=5, last_batch=last_batch) for _ in range(3))
    for pipeline in a, b:
        pipeline.scan(lambda batch: batch["id"], 6)  # into the second pass
    for _ in range(6):
        c.step()
    other = copy.deepcopy(c)
    assert ids([a.step()]) == ids([c.step()])
    assert ids(b) == ids(other) != []
    assert a.cursor == c.cursor and b.cursor == other.cursor


@pytest.mark.spec("SRC-028")
@pytest.mark.parametrize("again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_a_stream_resumes_by_skipping(before, again):
    one = Pipeline(source=IterableSource(IterableSourceConfig(), [*records()]), batch_size=4)
    for _ in range(before):
        one.step()
    other = Pipeline(source=stream(), batch_size=4)
    other.set_state(one.get_state())
    third = again(one)
    for _ in range(4):
        expected = ids([one.step()])
        assert ids([other.step()]) == expected
        assert ids([third.step()]) == expected


@pytest.mark.spec("SRC-029")
def test_random_access_to_a_stream_is_refused():
    source = stream()
    with pytest.raises(RandomAccessError, match="gives its records in order"):
        jax.jit(lambda i: source.get_batch_at(i, 2, None))(jnp.uint32(0))
    with pytest.raises(RandomAccessError, match="replay needs a source"):
        Pipeline(source=source, batch_size=2).replay(0)
    with pytest.raises(TypeError, match="new iterator"):
        IterableSource(IterableSourceConfig(), records())


@pytest.mark.spec("SRC-029", "ERR-023")
def test_a_stream_without_records_is_refused():
    with pytest.raises(EmptySourceError):
        Pipeline(source=stream(lambda: iter(())), batch_size=2)
    short = Pipeline(source=stream(), batch_size=N + 1, last_batch="drop")
    with pytest.raises(EmptySourceError) as caught:
        short.step()
    assert str(caught.value) == (
        'Under last_batch="drop" a pass must hold at least one batch of 24, but one over '
        "IterableSource holds 23 records. Choose a smaller `batch_size`, or another `last_batch`."
    )
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


@pytest.mark.spec("SRC-032")
def test_a_broken_record_of_a_stream_leaves_the_cursor_and_can_be_tried_again():
    healthy = False

    def some():
        for i in range(N):
            if i == 12 and not healthy:
                raise OSError("the disk is gone")
            yield {"id": i}

    pipeline = Pipeline(source=stream(some), batch_size=5)
    assert ids(pipeline.step() for _ in range(2)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    for _ in range(2):
        with pytest.raises(ReadError, match=r"record 12: .*the disk is gone") as caught:
            pipeline.step()
        assert caught.value.record == 12
        assert pipeline.cursor == (0, 10)
    healthy = True
    assert ids([pipeline.step()]) == [[10, 11, 12, 13, 14]]


@pytest.mark.spec("SRC-027")
def test_datasets_stream():
    source = HFStreamingSource(HFStreamingSourceConfig(), cases.hf_dataset())
    pipeline = Pipeline(source=source, batch_size=5)
    for _ in range(2):
        assert ids(pipeline) == law(5, "keep")
    pipeline.seek(epoch=0, offset=7)
    batch = pipeline.step()
    np.testing.assert_array_equal(batch["x"], cases.columns()["x"][7:12])


@pytest.mark.spec("SRC-027")
def test_tfds_streams(tmp_path):
    path = cases.prepared_tfds(tmp_path)
    source = TFDSStreamingSource(TFDSStreamingSourceConfig(path=path))
    pipeline = Pipeline(source=source, batch_size=5)
    first = ids(pipeline)
    assert sorted(np.concatenate(first)) == list(range(N))
    assert ids(pipeline) == first


@pytest.mark.spec("SRC-031")
def test_a_value_that_does_not_fit_is_named_with_its_own_record():
    def new():
        return iter({"id": 2**40 if i == 7 else i} for i in range(N))

    pipeline = Pipeline(source=stream(new), batch_size=5)
    pipeline.step()
    with pytest.raises(ReadError, match=r"record 7: .*'id' .*record 7 does not fit") as caught:
        pipeline.step()
    assert caught.value.record == 7


@pytest.mark.spec("SRC-027", "SRC-028")
@pytest.mark.parametrize("shards", [1, 4])
def test_a_data_set_that_shuffles_gives_every_pass_another_order(shards):
    def pipeline():
        datasets = cases.hf_dataset().to_iterable_dataset(num_shards=shards)
        config = HFStreamingSourceConfig(fields=("id",))
        source = HFStreamingSource(config, datasets.shuffle(seed=3, buffer_size=7))
        return Pipeline(source=source, batch_size=5)

    one = pipeline()
    passes = [np.concatenate(ids(one)).tolist() for _ in range(3)]
    assert all(sorted(found) == list(range(N)) for found in passes)
    assert len(set(map(tuple, passes))) == 3
    for epoch, offset in (0, 7), (2, 0), (2, 11):
        again = pipeline()
        again.seek(epoch=epoch, offset=offset)
        assert np.concatenate(ids(again)).tolist() == passes[epoch][offset:]


@pytest.mark.spec("SRC-031", "SRC-032")
def test_a_damaged_example_of_a_data_set_comes_after_those_before_it(tmp_path):
    path = cases.prepared_tfds(tmp_path)
    source = TFDSStreamingSource(TFDSStreamingSourceConfig(path=path))
    whole = np.concatenate(ids(Pipeline(source=source, batch_size=5))).tolist()

    reader = source.stream.reader
    decode = reader.decode
    broken = dataclasses.replace(reader, decode=lambda raw: decode(raw if raw != bad else b"\xff"))
    bad = reader._raw(np.array([12]))[0]
    source.stream.reader = broken
    pipeline, seen = Pipeline(source=source, batch_size=5), []
    for _ in range(2):
        with pytest.raises(ReadError, match="record 12:") as caught:
            for batch in pipeline:
                seen += batch["id"].tolist()
        assert (caught.value.record, pipeline.cursor) == (12, (0, 10))
    assert seen == whole[:10]


@pytest.mark.spec("SRC-020")
def test_prepared_data_are_found_from_another_folder(tmp_path, monkeypatch):
    path = cases.prepared_tfds(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = TFDSStreamingSourceConfig(path=path.relative_to(tmp_path))
    pipeline = Pipeline(source=TFDSStreamingSource(config), batch_size=5)
    pickled = pickle.dumps(pipeline)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ids(pickle.loads(pickled)) == ids(pipeline)


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("fields, error", [(["no"], "'no' is no feature"), ("id", "list of names")])
def test_fields_that_a_data_set_does_not_have_are_refused(fields, error, tmp_path):
    path = cases.prepared_tfds(tmp_path)
    with pytest.raises((ValueError, TypeError), match=error):
        TFDSStreamingSource(TFDSStreamingSourceConfig(path=path, fields=fields))
    config = TFDSStreamingSourceConfig(path=path, fields=["id"])
    assert list(TFDSStreamingSource(config).element_spec) == ["id"]


@pytest.mark.spec("KEYS-007", "SRC-027")
@pytest.mark.parametrize(
    "length, last_batch", [(8, "keep"), (10, "keep"), (10, "drop"), (10, "pad")]
)
def test_the_key_of_a_batch_is_that_of_its_first_record_in_all_modes(length, last_batch):
    def noise(batch, *, key):
        return {**batch, "noise": jax.random.bits(key, batch["id"].shape[:1])}

    def over(records):
        kind = IterableSource if records is ids else MemorySource
        config = IterableSourceConfig() if records is ids else MemorySourceConfig()
        return Pipeline(
            source=kind(config, records),
            stages=[noise],
            batch_size=4,
            last_batch=last_batch,
            rngs=nnx.Rngs(3),
        )

    ids = [{"id": np.int32(i)} for i in range(length)]
    sized, *streams = over({"id": np.arange(length, dtype=np.int32)}), over(ids), over(ids)
    expected = [sized.step() for _ in range(6)]
    scanned = streams[1].scan(lambda batch: batch, 6)
    for i, batch in enumerate(expected):
        other = streams[0].step()
        for name, x in batch.items():
            np.testing.assert_array_equal(other[name], x)
            np.testing.assert_array_equal(scanned[name][i], x)
    assert streams[0].cursor == streams[1].cursor


class Flaky(Stream):
    """Numbers, of which no pass begins while it is told to fail."""

    fails = 0

    def begin(self, epoch, skip):
        if self.fails:
            self.fails -= 1
            raise OSError("a hiccup")
        return iter([{"id": np.int32(i)} for i in range(skip, 8)])

    def __iter__(self):
        return self.begin(0, 0)


@pytest.mark.spec("SRC-031", "SRC-032")
def test_a_pass_that_does_not_begin_is_a_read_error_and_is_begun_again():
    pipeline = Pipeline(source=StreamSource(Flaky()), batch_size=4)
    again = pickle.loads(pickle.dumps(pipeline))  # the copy reads the first record again
    for some in pipeline, again:
        some.seek(epoch=0, offset=4)
        some.source.stream.fails = 2
        for _ in range(2):
            with pytest.raises(ReadError, match=r"read record \d: OSError: a hiccup"):
                some.step()
        assert some.step()["id"].tolist() == [4, 5, 6, 7]
    fresh = Flaky()  # threads still read ahead in the other one
    fresh.fails = 1
    with pytest.raises(ReadError, match="IterableSource could not read record 0: OSError: a hicc"):
        Pipeline(source=IterableSource(IterableSourceConfig(), fresh), batch_size=4)


@pytest.mark.spec("SRC-027")
def test_a_stream_may_use_the_memory_of_a_record_again():
    def records():
        row = np.zeros(2, np.float32)
        for i in range(8):
            row[:] = i
            yield {"x": row}

    pipeline = Pipeline(source=IterableSource(IterableSourceConfig(), records), batch_size=4)
    assert [batch["x"][:, 0].tolist() for batch in pipeline] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.spec("SRC-031")
def test_all_batches_before_a_broken_example_come():
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")

    def examples():
        for i in range(400):
            if i == 300:
                raise OSError("a scratch")
            yield {"x": i}

    dataset = datasets.IterableDataset.from_generator(examples)
    source = HFStreamingSource(HFStreamingSourceConfig(), dataset)
    found = []
    with pytest.raises(ReadError, match="record 300: ") as caught:
        for batch in Pipeline(source=source, batch_size=4):
            found += batch["x"].tolist()
    assert found == [*range(300)]
    assert caught.value.record == 300


@pytest.mark.spec("SRC-031", "SRC-032")
def test_an_error_that_passes_slows_no_more_than_the_rows_it_was_in(caplog, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    sizes, broken, plain = [], [300], datasets.IterableDataset.iter

    def doubled(row):
        if row["x"] in broken:
            broken.clear()
            raise OSError("no network")
        return {"x": 2 * row["x"]}

    def noted(self, batch_size, **options):
        sizes.append(batch_size)
        return plain(self, batch_size, **options)

    monkeypatch.setattr(datasets.IterableDataset, "iter", noted)
    dataset = datasets.Dataset.from_dict({"x": [*range(1000)]}).to_iterable_dataset().map(doubled)
    source = HFStreamingSource(HFStreamingSourceConfig(), dataset)
    with caplog.at_level(logging.WARNING, "datarax"):
        batches = [*Pipeline(source=source, batch_size=100)]
    assert [x for batch in batches for x in batch["x"].tolist()] == [*range(0, 2000, 2)]
    assert [*itertools.islice(sizes, 3)] == [256, 1, 256]
    assert caplog.messages == [
        "HFStreamingSource could not read rows 256 to 511 of epoch 0 (OSError('no network')) and "
        "reads them again, one by one"
    ]


@pytest.mark.internal("a record is looked at closely only where it has to be")
def test_a_record_is_copied_as_it_is_or_looked_at_more_closely():
    stored = {"x": jax.ShapeDtypeStruct((2,), np.float32), "n": jax.ShapeDtypeStruct((), np.int64)}
    held = {**stored, "n": jax.ShapeDtypeStruct((), np.int32)}
    x = np.ones(2, np.float32)
    copied = copier(stored, held)
    for n in (3, -(2**31), 2**31 - 1):
        found = copied({"x": x, "n": n})
        assert (found["n"], found["n"].dtype) == (n, np.int64)
        assert found["x"].tolist() == [1, 1] and not np.shares_memory(found["x"], x)
    others = [
        {"x": x, "n": 2**31},
        {"x": x, "n": True},
        {"x": x, "n": 3.0},
        {"x": x, "n": np.int64(3)},
        {"x": x},
        {"x": x.astype(float), "n": 3},
        {"x": x[:1], "n": 3},
        {"x": x.astype(">f4"), "n": 3},
        {"x": np.ma.masked_array(x), "n": 3},
        {"x": [1.0, 1.0], "n": 3},
        [x, 3],
    ]
    assert [copied(record) for record in others] == [None] * len(others)
    assert copier(stored, stored)({"x": x, "n": np.int64(3)})["n"].dtype == np.int64


@pytest.mark.spec("SRC-031")
def test_nothing_is_read_again_once_the_program_ends(caplog):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    pool = concurrent.futures.ThreadPoolExecutor(1)

    def fetched(row):
        return {"x": pool.submit(int, row["x"]).result()}

    dataset = datasets.Dataset.from_dict({"x": [*range(1000)]}).to_iterable_dataset().map(fetched)
    pipeline = Pipeline(
        source=HFStreamingSource(HFStreamingSourceConfig(), dataset), batch_size=100
    )
    pipeline.step()
    pool.shutdown()  # as the interpreter does first at shutdown
    with caplog.at_level(logging.WARNING, "datarax"), pytest.raises(ReadError):
        pipeline.scan(lambda batch: batch["x"], 9)
    assert caplog.messages == []


@pytest.mark.spec("SRC-031")
def test_lists_of_another_length_are_so_wherever_they_stand():
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    lists = {"x": [[i, i] for i in range(300)] + [[i] * 3 for i in range(300, 512)]}
    dataset = datasets.Dataset.from_dict(lists).to_iterable_dataset()
    source, found = HFStreamingSource(HFStreamingSourceConfig(), dataset), []
    with pytest.raises(ReadError) as caught:
        for batch in Pipeline(source=source, batch_size=4):
            found += batch["x"][:, 0].tolist()
    assert (found, caught.value.record) == ([*range(300)], 300)


@pytest.mark.spec("SRC-019")
def test_a_table_is_no_stream_of_records(unchecked):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="iterate over a DataFrame does not give its records"):
        IterableSource(IterableSourceConfig(), pandas.DataFrame({"x": [1, 2]}))


@pytest.mark.spec("SRC-019")
def test_columns_are_no_records(unchecked):
    with pytest.raises(TypeError, match=r"got a dict, which gives its keys\. A dict of columns"):
        IterableSource(IterableSourceConfig(), {"x": np.zeros(3)})
    with pytest.raises(TypeError, match=r"data\[i\], and got a dict. A dict of columns is for Mem"):
        RandomAccessSource(RandomAccessSourceConfig(), {"x": np.zeros(3)})
    numbered = RandomAccessSource(RandomAccessSourceConfig(), {0: {"x": 1}, 1: {"x": 2}})
    assert numbered.get_batch_at(0, 2)["x"].tolist() == [1, 2]


# Windows.


def windows(size, new=records, **options):
    config = IterableSourceConfig(shuffle=True, window=size)
    return IterableSource(config, new, **options)


# No property of Hypothesis: beartype draws from `random` in threads that read, which it minds.
@pytest.mark.spec("SRC-039")
@pytest.mark.parametrize("length, size", [(1, 1), (7, 1), (12, 4), (13, 4), (9, 30), (30, 7)])
@pytest.mark.parametrize(
    "batch_size, place", [(1, (0, 0)), (4, (0, 5)), (9, (3, 11)), (40, (2, 1))]
)
def test_a_window_is_that_of_an_epoch_shuffled_by_blocks(length, size, batch_size, place):
    def numbers():
        return iter({"id": np.int32(i)} for i in range(length))

    source = windows(size, numbers)
    pipeline = Pipeline(source=source, batch_size=batch_size, last_batch="pad", rngs=nnx.Rngs(7))
    epoch, offset = place[0], place[1] % length
    pipeline.seek(epoch=epoch, offset=offset)
    found = np.concatenate([np.asarray(b["id"])[np.asarray(b["mask"])] for b in pipeline])
    key = model.fold_in(model.epoch_key(model.base_key(7), epoch), 2**33)
    expected = []
    for number, start in enumerate(range(0, length, size)):
        span = min(size, length - start)
        expected += (start + model.order(model.fold_in(key, number), span, range(span))).tolist()
    assert found.tolist() == expected[offset:]


@pytest.mark.spec("SRC-039", "SRC-027")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_windows_are_the_same_in_every_mode_and_for_every_cut(last_batch):
    check_source(windows(5))
    whole = [
        *itertools.chain.from_iterable(
            ids(Pipeline(source=windows(5), batch_size=N, rngs=nnx.Rngs(0)))
        )
    ]
    assert sorted(whole) == list(range(N)) and whole != list(range(N))
    for start in range(0, N, 5):
        assert sorted(whole[start : start + 5]) == list(range(start, min(start + 5, N)))
    pipeline = Pipeline(source=windows(5), batch_size=4, last_batch=last_batch, rngs=nnx.Rngs(0))
    cut = [*itertools.chain.from_iterable(ids(pipeline))]
    end = N // 4 * 4 if last_batch == "drop" else N
    assert cut[:end] == whole[:end]


@pytest.mark.spec("SRC-039", "KEYS-006")
def test_what_a_stage_draws_for_a_record_does_not_hang_on_the_shuffle():
    def drawn(source):
        pipeline = Pipeline(source=source, stages=[record_words], batch_size=4, rngs=nnx.Rngs(3))
        batches = list(pipeline)
        keys = np.concatenate([np.asarray(batch["keys"]) for batch in batches])
        return keys[np.argsort(np.concatenate(ids(batches)))].tolist()

    assert drawn(windows(6)) == drawn(stream())


@pytest.mark.internal
@pytest.mark.parametrize("first", [[], [(0, 2)]], ids=["begun", "read on"])
def test_a_stream_that_skips_stops_when_the_program_ends(first, monkeypatch):
    monkeypatch.setattr(_reader, "ENDING", threading.Event())
    seen = []

    def rows():
        for i in range(100):
            seen.append(i)
            if i == 5:
                _reader.ENDING.set()
            yield {"id": np.int32(i)}

    stream = IterableSource(IterableSourceConfig(), rows).stream
    spec = {"id": jax.ShapeDtypeStruct((), np.int32)}
    vars(stream)["_pass"].spec = spec
    for offset, count in first:
        stream.read(0, offset, count, spec)
    with pytest.raises(ReadError, match="The program is ending"):
        stream.read(0, 50, 1, spec)
    assert seen[-1] == 5


@pytest.mark.spec("SRC-039", "SRC-028", "STATE-009", "STATE-010")
def test_a_run_resumes_within_a_window_and_reads_only_that_window_again():
    class Counted(Stream):
        def begin(self, epoch, skip):
            vars(self).setdefault("asked", []).append((epoch, skip))
            return itertools.islice(records(), skip, None)

    def pipeline(size=6, seed=0):
        config = StreamSourceConfig(shuffle=True, window=size)
        return Pipeline(source=StreamSource(Counted(), config), batch_size=4, rngs=nnx.Rngs(seed))

    one, other = pipeline(), pipeline()
    for _ in range(2):
        one.step()
    state = one.get_state()
    other.set_state(state)
    assert ids([other.step()]) == ids([one.step()])
    begun = [place for place in other.source.stream.asked if place[0] == 0]
    assert begun == [(0, 0), (0, 6)]  # the first for its spec
    for differs, field in ((pipeline(size=5), "order"), (pipeline(seed=1), "seed")):
        with pytest.raises(StateError, match=field):
            differs.set_state(state)


@pytest.mark.spec("SRC-039")
@pytest.mark.parametrize("kind", ["hf", "tfds"])
def test_prepared_streams_come_in_windows_too(kind, tmp_path):
    def source(**options):
        if kind == "hf":
            config = HFStreamingSourceConfig(**options)
            return HFStreamingSource(config, cases.hf_dataset(), rngs=nnx.Rngs(2))
        path = cases.prepared_tfds(tmp_path)
        return TFDSStreamingSource(
            TFDSStreamingSourceConfig(path=path, **options), rngs=nnx.Rngs(2)
        )

    stored = ids(Pipeline(source=source(), batch_size=6))
    found = ids(Pipeline(source=source(shuffle=True, window=6), batch_size=6))
    assert found != stored and [*map(sorted, found)] == [*map(sorted, stored)]


@pytest.mark.spec("SRC-039", "SRC-027")
@pytest.mark.parametrize("size", [1, 5, N, 100])
def test_windows_end_where_the_pass_does(size):
    reader = Windows(stream().stream, size, lambda epoch: np.zeros((1, 2), np.uint32))
    spec = stream().element_spec
    found, numbers = reader.read(0, 0, 100, spec)
    assert [record["id"] for record in found] == numbers and sorted(numbers) == list(range(N))
    for offset in (N, N + 3, 200):
        assert reader.read(0, offset, 4, spec) == ([], [])


@pytest.mark.spec("SRC-039")
def test_a_window_that_cannot_be_read_comes_after_those_before_it():
    broken = [11]

    def some():
        for i in range(N):
            if i in broken:
                raise OSError("no more")
            yield {"id": i}

    pipeline = Pipeline(source=windows(5, some), batch_size=5, rngs=nnx.Rngs(0))
    batches = iter(pipeline)
    first, second = ids([next(batches), next(batches)])
    assert sorted(first + second) == list(range(10))
    for _ in range(2):
        with pytest.raises(ReadError, match="record 11"):
            next(batches)
        assert pipeline.cursor == (0, 10)
    broken.clear()
    assert sorted(ids([next(batches)])[0]) == list(range(10, 15))


@pytest.mark.spec("SRC-039", "KEYS-010")
def test_a_source_with_a_seed_of_its_own_shuffles_by_that():
    mine = Pipeline(source=windows(9, rngs=nnx.Rngs(4)), batch_size=N)
    same = Pipeline(source=windows(9), batch_size=N, rngs=nnx.Rngs(4))
    other = Pipeline(source=windows(9), batch_size=N, rngs=nnx.Rngs(5))
    assert ids(mine) == ids(same) != ids(other)
    with pytest.raises(RngsError, match="'source' draws random numbers and needs a seed"):
        Pipeline(source=windows(9), batch_size=N)


@pytest.mark.spec("SRC-039")
@pytest.mark.parametrize(
    "options, text",
    [
        ({"shuffle": "blocks"}, "`shuffle` of a stream is False or True, which is within windows"),
        ({"window": 0}, "`window` is an integer in [1, 2**31), got 0."),
        ({"window": True}, "`window` is an integer in [1, 2**31), got True."),
        ({"window": 2**31}, "`window` is an integer in [1, 2**31), got 2147483648."),
    ],
)
def test_windows_that_are_none_are_refused(options, text, unchecked):
    with pytest.raises(ValueError, match=re.escape(text)):
        IterableSourceConfig(**options)


@pytest.mark.spec("SRC-027")
def test_a_stream_may_begin_with_a_list():
    class Listed(Stream):
        def begin(self, epoch, skip):
            return [{"id": np.int32(i)} for i in range(skip, N)]

    pipeline = Pipeline(source=StreamSource(Listed()), batch_size=5)
    for _ in range(2):
        assert ids(pipeline) == law(5, "keep")


class Plain(Stream):
    def __init__(self, n):
        self.n = n

    def begin(self, epoch, skip):
        return ({"id": np.int32(i)} for i in range(skip, self.n))


@dataclasses.dataclass(frozen=True)
class Frozen(Plain):
    n: int


@dataclasses.dataclass
class Written(Plain):
    n: int


@pytest.mark.spec("SRC-027", "SRC-020")
@pytest.mark.parametrize("kind", [Plain, Frozen, Written])
def test_a_stream_is_written_as_any_class_is(kind):
    pipeline = Pipeline(source=StreamSource(kind(N)), batch_size=5)
    twins = [pipeline, copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))]
    assert [ids(twin) for twin in twins] == [law(5, "keep")] * 3


class Listing(Plain):
    def begin(self, epoch, skip):
        return ([i] for i in range(skip, self.n))


@pytest.mark.spec("SRC-027", "ERR-023")
def test_a_record_of_a_stream_that_is_no_dict_is_named(unchecked):
    with pytest.raises(ReadError, match="records as dicts of arrays and numbers, and this one is"):
        Pipeline(source=StreamSource(Listing(N)), batch_size=5)


@pytest.mark.spec("SRC-027", "ERR-023")
def test_what_is_no_stream_is_refused(unchecked):
    for value, name in ((5, "int"), (records, "function"), (Plain, "ABCMeta")):
        with pytest.raises(TypeError, match=f"`stream` must be of type Stream, got {name}"):
            StreamSource(value)

    class Unwritten(Stream):
        pass

    with pytest.raises(TypeError, match=r"abstract.*begin"):
        Unwritten()


class Drained:
    """Takes records out of a queue, until there are no more."""

    def __init__(self, records):
        self.queue = collections.deque(records)

    def __iter__(self):
        while self.queue:
            yield self.queue.popleft()


def same_iterator():
    once = records()
    return lambda: once


def same_reader():
    lines = iter(map(str, range(N)))
    return lambda: ({"id": int(line)} for line in lines)


ONCE = {"iterator": same_iterator, "reader": same_reader, "queue": lambda: Drained(records())}


@pytest.mark.spec("ITER-001", "SRC-027", "SRC-029")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
@pytest.mark.parametrize("once", ONCE.values(), ids=ONCE)
def test_what_gives_its_records_only_once_gives_all_of_them_in_one_epoch(once, last_batch):
    pipeline = Pipeline(source=stream(once()), batch_size=5, last_batch=last_batch)
    assert ids(pipeline) == law(5, last_batch)
    for _ in range(2):
        with pytest.raises(EmptySourceError, match=r"pass 1 over IterableSource.* for every epoch"):
            next(iter(pipeline))
        assert pipeline.cursor == (1, 0)


@pytest.mark.spec("SRC-027", "SRC-028", "SRC-039")
@pytest.mark.parametrize("place", [(0, 0), (0, 4), (0, 13), (2, 0), (2, 7)])
@pytest.mark.parametrize("once", ONCE.values(), ids=ONCE)
def test_what_gives_its_records_only_once_resumes(once, place):
    epoch, offset = place
    for source in (lambda new: stream(new), lambda new: windows(6, new)):
        whole, again = (
            Pipeline(source=source(new), batch_size=5, rngs=nnx.Rngs(0))
            for new in (records, once())
        )
        whole.seek(epoch=epoch, offset=offset)
        again.seek(epoch=epoch, offset=offset)
        assert ids(again) == ids(whole)


class Noise(nnx.Module):
    def __init__(self):
        self.drop, self.factor = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), 1.0

    def __call__(self, batch):
        return batch | {"x": self.factor * self.drop(jnp.ones(batch["id"].shape))}


@pytest.mark.internal("SRC-028 says where a stream goes on; this is what it costs")
def test_a_stage_that_changes_does_not_begin_a_pass_anew():
    begun = []

    def many():
        begun.append(1)
        return ({"id": np.int32(i)} for i in range(4000))

    source = IterableSource(IterableSourceConfig(), many)
    pipeline = Pipeline(source=source, stages=[Noise()], batch_size=4)
    expected = itertools.count(step=4)

    def go_on():
        for _ in range(3):
            assert pipeline.step()["id"][0] == next(expected)

    go_on()
    pipeline.eval()
    go_on()
    pipeline.train()
    pipeline.nodes["Noise"].factor = 2.0
    go_on()
    pipeline.nodes["Noise"] = Noise()
    go_on()
    assert len(begun) == 1
    pipeline.seek(epoch=0, offset=400)
    assert pipeline.step()["id"][0] == 400


@pytest.mark.spec("SRC-031", "ERR-031")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_record_unlike_the_others_is_told_so(shuffle):
    def unlike():
        yield {"t": np.zeros(3, np.int32)}
        yield {"t": np.zeros(4, np.int32)}

    config = IterableSourceConfig(shuffle=shuffle)
    pipeline = Pipeline(source=IterableSource(config, unlike), batch_size=2, rngs=nnx.Rngs(0))
    with pytest.raises(ReadError) as error:
        pipeline.step()
    assert str(error.value) == (
        "Stage 'source': IterableSource could not read record 1: it has t int32[4], and not t "
        "int32[3]\nAll records of a source have the same fields, shapes and types: make them so "
        "where they are read."
    )


@pytest.mark.spec("SRC-027", "SRC-032")
def test_a_pass_that_held_nothing_is_begun_again():
    drained = Drained(records())
    pipeline = Pipeline(source=stream(drained), batch_size=5)
    assert ids(pipeline) == law(5, "keep")
    with pytest.raises(EmptySourceError):
        next(iter(pipeline))
    drained.queue.extend(records())
    assert ids(pipeline) == law(5, "keep")


@pytest.mark.spec("SRC-027")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_pass_may_be_bound_to_the_thread_that_began_it():
    begun, ended = [], []

    def rows():
        begun.append(threading.get_ident())
        try:
            with contextlib.closing(sqlite3.connect(":memory:")) as base:
                base.execute("create table numbers (id)")
                base.executemany("insert into numbers values (?)", [(i,) for i in range(N)])
                numbers = base.execute("select id from numbers order by id")
                yield from ({"id": i} for (i,) in numbers)
        finally:
            ended.append(threading.get_ident())

    pipeline = Pipeline(source=stream(rows), batch_size=5)
    for _ in range(2):
        assert ids(pipeline) == law(5, "keep")
    assert len(set(begun)) == 2
    # Collect the generators here: SQLite objects closed by another thread cause the warning above.
    del pipeline
    until = time.monotonic() + 60
    while len(ended) < len(begun) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)  # the reading thread may still hold the last of them
    assert len(ended) == len(begun)


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("bad", [1, 3, 12])
@pytest.mark.parametrize("generated", [False, True])
def test_an_error_of_what_cannot_be_begun_again_comes_after_the_batches_before_it(bad, generated):
    def read(i):
        if i == bad:
            raise OSError("a scratch")
        return {"id": i}

    once = iter(range(N))
    same = (read(i) for i in once)
    pipeline = Pipeline(
        source=stream((lambda: same) if generated else (lambda: map(read, once))), batch_size=1
    )
    seen = []
    with pytest.raises(ReadError, match=f"record {bad}: OSError: a scratch"):
        for batch in pipeline:
            seen += ids([batch])
    assert seen == [[i] for i in range(bad)]


@pytest.mark.spec("SRC-027", "SRC-011")
def test_pipelines_over_one_stream_each_get_all_of_it():
    source = stream([*records()])
    pipelines = [Pipeline(source=source, batch_size=5) for _ in range(2)]
    iterators, found = [iter(pipeline) for pipeline in pipelines], ([], [])
    for batches in zip(*iterators, strict=True):
        for mine, batch in zip(found, ids(batches), strict=True):
            mine.append(batch)
    assert found == (law(5, "keep"), law(5, "keep"))


class Panic(BaseException):
    """As libraries written in Rust raise it."""


@pytest.mark.spec("SRC-031", "SRC-032")
@pytest.mark.parametrize("kind", [Panic, asyncio.CancelledError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("make", [stream, lambda new: windows(5, new), "sized"])
def test_what_is_no_exception_comes_to_the_caller_and_loses_nothing(kind, make):
    healthy = False

    class Data:
        def __len__(self):
            return 4 * N

        def __getitem__(self, i):
            if i == 62 and not healthy:
                raise kind("no more")
            return {"id": i}

    data = Data()
    if make == "sized":
        source = RandomAccessSource(RandomAccessSourceConfig(), data)
    else:
        source = make(lambda: (data[i] for i in range(len(data))))
    pipeline, seen = Pipeline(source=source, batch_size=5, rngs=nnx.Rngs(0)), []
    for _ in range(2):
        with pytest.raises(kind, match="no more"):
            for batch in pipeline:
                seen += batch["id"].tolist()
        assert pipeline.cursor == (0, 60)
    healthy = True
    for batch in pipeline:
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(4 * N))
    healthy = False
    with pytest.raises(kind, match="no more"):
        pipeline.scan(lambda batch: batch["id"], 15)
    assert pipeline.cursor == (1, 0)


@pytest.mark.spec("SRC-031")
def test_what_is_no_exception_comes_from_the_first_record_as_it_is():
    def some():
        raise Panic("no more")
        yield

    with pytest.raises(Panic, match="no more"):
        Pipeline(source=stream(some), batch_size=5)


class Endless(Stream):
    def begin(self, epoch, skip):
        return ({"id": np.uint32(i % 2**32)} for i in itertools.count(skip))


@pytest.mark.spec("SRC-028", "ERR-022")
@pytest.mark.parametrize("mode", ["for", "step", "scan"])
@pytest.mark.parametrize("config", [{}, {"shuffle": True, "window": 4}], ids=["stored", "windows"])
def test_a_stream_is_read_as_far_as_the_cursor_counts(mode, config):
    source = StreamSource(Endless(), StreamSourceConfig(**config))
    pipeline = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0))
    pipeline.seek(epoch=0, offset=2**32 - 6)
    batches = iter(pipeline) if mode == "for" else iter(pipeline.step, None)
    if mode == "scan":
        with pytest.raises(SeekError, match="no cursor counts further"):
            pipeline.scan(lambda batch: batch["id"], 2)
        assert pipeline.cursor == (0, 2**32 - 6)
    assert len(next(batches)["id"]) == 4
    for _ in range(2):
        with pytest.raises(SeekError, match=r"ends before \(0, 42949672..\): no cursor counts"):
            next(batches)
        assert pipeline.cursor == (0, 2**32 - 2)


@pytest.mark.spec("SRC-039", "ERR-022")
def test_a_window_that_holds_records_which_no_cursor_counts_is_refused():
    source = StreamSource(Endless(), StreamSourceConfig(shuffle=True, window=2**10 - 1))
    pipeline = Pipeline(source=source, batch_size=500, rngs=nnx.Rngs(0))
    pipeline.seek(epoch=0, offset=2**32 - 700)
    with pytest.raises(SeekError, match="no cursor counts further"):
        for _ in range(2):
            pipeline.step()


class CanBeCalled(list):
    def __call__(self, more):
        raise NotImplementedError


@pytest.mark.spec("SRC-027")
def test_an_iterable_that_can_be_called_is_iterated():
    source = IterableSource(
        IterableSourceConfig(), CanBeCalled({"x": np.int32(i)} for i in range(3))
    )
    [batch] = Pipeline(source=source, batch_size=3)
    assert batch["x"].tolist() == [0, 1, 2]
