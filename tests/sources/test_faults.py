"""Faults in storage: errors name them, masks survive and count them, nothing is unpickled."""

import dataclasses
import decimal
import gc
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ahead

from datarax import Pipeline
from datarax.errors import (
    EmptySourceError,
    FieldTypeError,
    FileError,
    ReadError,
    UnequalLengthsError,
)
from datarax.sources import (
    ArrayRecordSource,
    ArrayRecordSourceConfig,
    ArrowSource,
    ArrowSourceConfig,
    EagerSourceBase,
    HFEagerSource,
    HFEagerSourceConfig,
    HFStreamingSource,
    HFStreamingSourceConfig,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    MixDataSourcesConfig,
    MixDataSourcesNode,
    RandomAccessSource,
    RandomAccessSourceConfig,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
    TFDSEagerSource,
    TFDSEagerSourceConfig,
    TFDSStreamingSource,
    TFDSStreamingSourceConfig,
    _reader,
    _storage,
    encode,
)

from . import cases
from .cases import N


class Broken:
    """Records of which some cannot be read."""

    def __init__(self, bad, n=N):
        self.bad, self.n = set(bad), n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError(f"no record {i}")
        return {"id": np.int32(i + 1)}


def over(data, *, batch_size=5, last_batch="keep", shuffle=False, **config):
    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=shuffle, **config), data)
    return Pipeline(source=source, batch_size=batch_size, last_batch=last_batch, rngs=nnx.Rngs(0))


@pytest.mark.spec("SRC-031", "SRC-032")
def test_the_batches_before_a_broken_record_come_and_a_retry_goes_on():
    data = Broken([17])
    pipeline = over(data)
    seen = []
    with pytest.raises(ReadError, match=r"'source'.* record 17 of Broken.*no record 17") as caught:
        for batch in pipeline:
            seen += np.asarray(batch["id"]).tolist()
    error = caught.value
    assert (error.source, error.file, error.record, error.stage) == (
        "RandomAccessSource",
        "Broken",
        17,
        "source",
    )
    assert isinstance(error.__cause__, OSError)
    assert seen == [*range(1, 16)] and pipeline.cursor == (0, 15)
    data.bad.clear()
    for batch in pipeline:
        seen += np.asarray(batch["id"]).tolist()
    assert seen == [*range(1, N + 1)]


@pytest.mark.spec("SRC-032")
def test_a_scan_that_fails_has_moved_nothing():
    data = Broken([22])
    pipeline = over(data, last_batch="pad")
    with pytest.raises(ReadError, match="record 22"):
        pipeline.scan(lambda batch: batch["id"])
    assert pipeline.cursor == (0, 0)
    data.bad.clear()
    assert pipeline.scan(lambda batch: batch["id"].sum()).sum() == N * (N + 1) // 2


@pytest.mark.spec("SRC-030", "SRC-032")
@pytest.mark.parametrize("stages", [[], [dict]], ids=["bare", "staged"])
def test_a_scan_that_fails_amid_a_loop_loses_none_of_its_batches(stages):
    source = RandomAccessSource(RandomAccessSourceConfig(), Broken([60], 70))
    pipeline = Pipeline(source=source, stages=stages, batch_size=5)
    batches = iter(pipeline)
    with ahead(8):
        seen = [next(batches)["id"] for _ in range(5)]
        with pytest.raises(ReadError, match="record 60"):
            pipeline.scan(lambda batch: batch["id"], 8)
        seen += [next(batches)["id"] for _ in range(6)]
    assert np.concatenate(seen).tolist() == [*range(1, 56)]


@pytest.mark.spec("SRC-033")
@pytest.mark.parametrize("last_batch", ["keep", "pad"])
@pytest.mark.parametrize("mode", ["for", "scan"])
def test_masked_records_are_zero_counted_and_reported(last_batch, mode, caplog):
    pipeline = over(
        Broken([3, 17]), batch_size=23, last_batch=last_batch, on_error="mask", max_errors=2
    )
    with caplog.at_level(logging.WARNING, "datarax"):
        if mode == "for":
            (batch,) = pipeline
        else:
            batch = jax.tree.map(lambda x: x[0], pipeline.scan(lambda batch: batch))
    assert np.flatnonzero(~np.asarray(batch["mask"])).tolist() == [3, 17]
    assert np.asarray(batch["id"]).tolist() == [0 if i in (3, 17) else i + 1 for i in range(N)]
    assert "Masked in epoch 0: 2 of the records" in caplog.text
    assert "record 17 of Broken: OSError('no record 17')" in caplog.text


@pytest.mark.spec("SRC-033")
def test_a_masked_record_in_the_users_own_jit():
    pipeline = over(Broken([3]), on_error="mask", max_errors=1)
    batch = nnx.jit(lambda pipeline: pipeline.step())(pipeline)
    assert np.asarray(batch["mask"]).tolist() == [True, True, True, False, True]
    assert np.asarray(batch["id"]).tolist() == [1, 2, 3, 0, 5]


@pytest.mark.spec("SRC-033")
def test_more_than_max_errors_are_an_error_that_leaves_the_cursor():
    pipeline = over(Broken([3, 17]), on_error="mask", max_errors=1)
    for _ in range(3):
        pipeline.step()
    for _ in range(2):
        with pytest.raises(
            ReadError,
            match=r"before it 1 of epoch 0 .* max_errors=1 allows.*\n.*Raise `max_errors`",
        ):
            pipeline.step()
        assert pipeline.cursor == (0, 15)
    assert pipeline.stats().masked == 1


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("form", ["objects", "files"])
def test_the_first_record_may_be_the_broken_one(form, tmp_path):
    if form == "files":
        good = [encode({"id": np.int32(i + 1)}) for i in range(1, N)]
        paths = cases.array_record(tmp_path / "0.array_record", [b"junk", *good])

    def pipeline(**config):
        if form == "files":
            source = ArrayRecordSource(ArrayRecordSourceConfig(paths=paths, **config))
            return Pipeline(source=source, batch_size=5)
        return over(Broken([0]), **config)

    broken = pipeline()
    with pytest.raises(ReadError, match="record 0 of ") as caught:
        broken.step()
    assert (caught.value.record, broken.cursor) == (0, (0, 0))
    batch = pipeline(on_error="mask", max_errors=1).step()
    assert batch["id"].tolist() == [0, 2, 3, 4, 5]
    assert batch["mask"].tolist() == [False, True, True, True, True]


@pytest.mark.spec("SRC-032", "SRC-033")
@pytest.mark.parametrize("stages", [[], [lambda batch: batch]], ids=["bare", "staged"])
def test_a_retry_reads_what_was_too_much_to_mask_again(stages):
    data = Broken([3, 17])
    source = RandomAccessSource(RandomAccessSourceConfig(on_error="mask", max_errors=1), data)
    pipeline = Pipeline(source=source, stages=stages, batch_size=5)
    with pytest.raises(ReadError, match="max_errors=1 allows"):
        for _ in pipeline:
            pass
    data.bad = {3}  # the disk comes back
    batch = pipeline.step()
    assert (batch["id"].tolist(), batch["mask"].all()) == ([16, 17, 18, 19, 20], True)


@pytest.mark.spec("SRC-033")
@pytest.mark.parametrize(
    "config",
    [
        {"on_error": "skip"},
        {"max_errors": 3},
        {"on_error": "mask"},
        {"max_errors": None},
        {"on_error": "mask", "max_errors": 1.5},
    ],
)
def test_a_policy_that_means_nothing_is_refused(unchecked, config):
    with pytest.raises(ValueError):
        RandomAccessSourceConfig(**config)


@pytest.mark.spec("SRC-030")
@pytest.mark.parametrize("number", [0, -1, 2.5, "2", True, None], ids=repr)
def test_a_number_of_threads_that_is_none_is_refused(unchecked, number):
    source = RandomAccessSource(RandomAccessSourceConfig(), Broken([]))
    with pytest.raises(ValueError, match="`num_threads` must be an integer of at least 1, got"):
        Pipeline(source=source, batch_size=5, num_threads=number)


@pytest.mark.spec("SRC-033", "SRC-030")
@pytest.mark.parametrize("mode", ["step", "for"])
def test_a_masked_record_counts_when_its_batch_comes(mode):
    # One call reads several epochs, and the record is masked in each of them.
    pipeline = over(Broken([6], n=10), batch_size=4, on_error="mask", max_errors=1)
    batches = iter(pipeline) if mode == "for" else iter(pipeline.step, None)
    counts = []
    for _ in range(3):
        next(batches)
        counts.append(pipeline.stats().masked)
    assert counts == [0, 1, 1]
    list(pipeline), list(pipeline)  # the rest of an epoch, and another one
    assert pipeline.stats().masked == 3


@pytest.mark.spec("SRC-034")
def test_replay_gives_the_values_of_the_run():
    def noise(batch, *, keys):
        return {**batch, "noise": jax.vmap(jax.random.normal)(keys)}

    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=True), Broken([]))
    pipeline = Pipeline(source=source, stages=[noise], batch_size=5, rngs=nnx.Rngs(0))
    pipeline.seek(epoch=2)
    epoch = [batch for batch in pipeline]
    before = pipeline.cursor
    for batch in epoch[:2]:
        for number, value in zip(batch["id"], batch["noise"], strict=True):
            alone = pipeline.replay(int(number) - 1, 2)
            assert alone["noise"]["noise"][0] == value
            assert alone["source"]["id"][0] == number
    assert pipeline.cursor == before


@pytest.mark.spec("SRC-034")
@pytest.mark.parametrize("kind", ["key", "keys"])
def test_what_is_replayed_has_values(kind):
    seen = []

    def look(batch, random):
        if not isinstance(batch["x"], jax.core.Tracer):  # it is one while the stage is traced
            seen.append((float(batch["x"][0]), int(jax.random.bits(random.reshape(-1)[0]))))
        return batch

    stage = {
        "key": lambda batch, *, key: look(batch, key),
        "keys": lambda batch, *, keys: look(batch, keys),
    }[kind]
    source = MemorySource(MemorySourceConfig(), {"x": np.arange(4.0, dtype=np.float32)})
    pipeline = Pipeline(source=source, stages=[stage], batch_size=2, rngs=nnx.Rngs(0))
    pipeline.replay(3)
    assert [x for x, _ in seen] == [3.0]


@pytest.mark.spec("SRC-034")
def test_replay_keeps_why_a_source_of_the_users_own_has_failed():
    failing = False

    class Own(EagerSourceBase):
        def __len__(self):
            return N

        def gather(self, records):
            if failing:
                raise RuntimeError("no rows") from KeyError("why")
            return {"id": records}

    pipeline = Pipeline(source=Own(), batch_size=5)
    failing = True
    with pytest.raises(RuntimeError, match="no rows") as caught:
        pipeline.replay(0)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize(
    "row, words",
    [
        ({"id": np.zeros(2, np.int32)}, r"int32\[2\], and not id int32\[\]"),
        ({"id": np.float32(0)}, "float32"),
        ({"id": np.float64(0)}, r"float64\[\], and not id int32\[\]"),
        ({"other": np.int32(0)}, "'other'"),
    ],
)
def test_a_row_of_another_kind_is_named(row, words):
    data = cases.rows()
    data = [{"id": x["id"]} for x in data]
    data[8] = row
    pipeline = over(data)
    pipeline.step()
    with pytest.raises(ReadError, match=f"record 8 .*{words}") as caught:
        pipeline.step()
    # Reading it again would not help, and masking it would hide a mistake in the program.
    assert str(caught.value).partition("\n")[2] == (
        "All records of a source have the same fields, shapes and types: make them so where they "
        "are read."
    )


@pytest.mark.spec("SRC-003", "SRC-005")
def test_features_keep_their_types(tmp_path):
    features = pytest.importorskip("tensorflow_datasets", reason="needs the extra 'tfds'").features
    numbers = [
        ("flag", np.bool_, True),
        ("byte", np.uint8, 200),
        ("word", np.uint32, 4_000_000_000),
        ("half", np.float16, 0.5),
    ]
    fields = [(name, features.Scalar(kind), value) for name, kind, value in numbers]
    fields += [
        ("wide", features.Scalar(np.int64), 2**40),
        ("class", features.ClassLabel(num_classes=3), 2),
        ("none", features.Sequence(np.int16), []),
        ("deep", {"a": features.Scalar(np.int8)}, {"a": -3}),
        ("text", features.Text(), "a"),
    ]
    path = cases.prepared_tfds(tmp_path, fields=fields)

    def batch(*names):
        source = TFDSEagerSource(TFDSEagerSourceConfig(path=path, fields=names))
        return Pipeline(source=source, batch_size=1).step()

    found = batch("flag", "byte", "word", "half", "class", "none", "deep")
    for name, kind, value in numbers:
        assert (found[name].dtype, found[name].tolist()) == (kind, [value])
    assert (found["class"].dtype, found["class"].tolist()) == (np.int32, [2])
    assert (found["none"].dtype, found["none"].shape) == (np.int16, (1, 0))
    assert (found["deep"]["a"].dtype, found["deep"]["a"].tolist()) == (np.int8, [-3])
    with jax.enable_x64(True):
        found = batch("wide", "byte", "half", "id")
        assert {name: x.dtype for name, x in found.items()} == {
            "wide": np.int64,
            "byte": np.uint8,
            "half": np.float16,
            "id": np.int32,
        }
    for name, words in ("wide", "record 0 does not fit"), ("text", "'text' holds bytes"):
        with pytest.raises(ValueError, match=words):
            batch(name)


@pytest.mark.spec("ITER-001", "SRC-011")
def test_a_data_set_that_is_prepared_again_is_another(tmp_path):
    def found(path):
        source = TFDSEagerSource(TFDSEagerSourceConfig(path=path))
        return sorted(
            i for batch in Pipeline(source=source, batch_size=5) for i in batch["id"].tolist()
        ), sorted(source.element_spec)

    path = cases.prepared_tfds(tmp_path)
    assert found(path) == ([*range(N)], ["id", "x"])
    shutil.rmtree(path)
    scalar = pytest.importorskip("tensorflow_datasets").features.Scalar
    path = cases.prepared_tfds(tmp_path, 2 * N, [("y", scalar(np.int32), 1)])
    assert found(path) == ([*range(2 * N)], ["id", "x", "y"])


@pytest.mark.spec("SRC-031")
def test_files_that_are_missing_or_no_arrays_are_named(tmp_path):
    def open_(path):
        return StreamingDiskSource(StreamingDiskSourceConfig(path=path))

    with pytest.raises(FileError, match=r"nothing.npy' cannot be opened: No such file"):
        open_(tmp_path / "nothing.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(FileError, match="has no header"):
        open_(tmp_path / "text.npy")
    np.save(tmp_path / "scalar.npy", np.float32(1))
    with pytest.raises(FileError, match="one row a record"):
        open_(tmp_path / "scalar.npy")
    folder = tmp_path / "unequal"
    folder.mkdir()
    np.save(folder / "a.npy", np.zeros(3, np.int32))
    np.save(folder / "b.npy", np.zeros(4, np.int32))
    with pytest.raises(UnequalLengthsError, match="'a': 3, 'b': 4"):
        open_(folder)


MANY_PARTS = """
import resource
import sys
from datarax.errors import FileError
from datarax.sources import *

paths = [sys.argv[1]] * 100
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
try:
    if paths[0].endswith(".npy"):
        StreamingDiskSource(StreamingDiskSourceConfig(path=paths))
    else:
        ArrayRecordSource(ArrayRecordSourceConfig(paths=paths))
except FileError as error:
    print(error)
"""


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("form", ["npy", "array_record"])
def test_more_files_than_may_be_open(form, tmp_path):
    pytest.importorskip("resource")
    file = tmp_path / f"part.{form}"
    if form == "npy":
        np.save(file, np.arange(3))
    else:
        cases.array_record(file, [encode({"id": np.int32(0)})])
    command = [sys.executable, "-c", MANY_PARTS, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.stdout == (
        f"File {str(file)!r} cannot be opened: Too many open files. A source keeps each of its "
        "files open: raise `ulimit -n`, or join some files.\n"
    ), out.stderr


@pytest.mark.spec("SRC-031")
def test_parts_that_are_unlike_are_named(tmp_path):
    def folder(name, **fields):
        (tmp_path / name).mkdir()
        for field, x in fields.items():
            np.save(tmp_path / name / f"{field}.npy", x)
        return tmp_path / name

    def open_(*parts):
        return StreamingDiskSource(StreamingDiskSourceConfig(path=parts))

    first = folder("first", x=np.zeros((3, 2), np.float32), y=np.zeros(3, np.int32))
    fields = folder("fields", x=np.zeros((3, 2), np.float32))
    with pytest.raises(FileError, match=r"fields' has the fields \['x'\], and not \['x', 'y'\]"):
        open_(first, fields)
    kind = folder("kind", x=np.zeros((3, 2), np.float32), y=np.zeros(3, np.int16))
    with pytest.raises(FileError, match=r"y.npy' has rows int16\[\], and not rows int32\[\]"):
        open_(first, kind)
    shape = folder("shape", x=np.zeros((3, 4), np.float32), y=np.zeros(3, np.int32))
    with pytest.raises(FileError, match=r"x.npy' has rows float32\[4\], and not rows float32\[2"):
        open_(first, shape)
    # Both files together have equally many rows of x and y.
    long = folder("long", x=np.zeros((4, 2), np.float32), y=np.zeros(2, np.int32))
    short = folder("short", x=np.zeros((2, 2), np.float32), y=np.zeros(4, np.int32))
    with pytest.raises(UnequalLengthsError, match=r"/long/x.npy': 4, '.*/long/y.npy': 2"):
        open_(first, long, short)
    with pytest.raises(EmptySourceError, match="an empty list"):
        open_()
    with pytest.raises(EmptySourceError):
        open_(folder("none", x=np.zeros((0, 2), np.float32), y=np.zeros(0, np.int32)))


@pytest.mark.spec("SRC-031")
def test_a_record_that_cannot_be_read_is_named_with_its_part(tmp_path):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.arange(50_000, dtype=np.int32))
    source = StreamingDiskSource(
        StreamingDiskSourceConfig(path=[tmp_path / "a.npy", tmp_path / "b.npy"])
    )
    pipeline = Pipeline(source=source, batch_size=10)
    pipeline.step()
    os.truncate(tmp_path / "b.npy", 1000)
    pipeline.seek(epoch=0, offset=60_000)
    with pytest.raises(ReadError, match=r"record 60000 of [^,]*/b.npy: .*was cut to 1000 bytes"):
        pipeline.step()


def wait_for_threads(pipeline):
    """Until no thread reads ahead: nothing helps a file that is cut in the midst of a read."""
    ahead = pipeline._runtime.reads.ahead
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with ahead._lock:
            if not (ahead._pending or ahead._reading):
                return
        time.sleep(0.01)
    raise AssertionError("the threads still read")


@pytest.mark.spec("SRC-036")
def test_a_file_that_is_cut_while_it_is_mapped_does_not_kill_the_process(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100_000, dtype=np.int32))
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=path))
    pipeline = Pipeline(source=source, batch_size=10)
    pipeline.step()
    wait_for_threads(pipeline)
    os.truncate(path, 1000)
    pipeline.seek(epoch=0, offset=90_000)
    with pytest.raises(ReadError, match="was cut to 1000 bytes"):
        pipeline.step()
    assert pipeline.cursor == (0, 90_000)


@pytest.mark.spec("SRC-036")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_is_cut_while_it_is_mapped_does_not_kill_the_process(streaming, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    data = datasets.Dataset.from_dict({"id": np.arange(100_000, dtype=np.int32)})
    data.save_to_disk(tmp_path)
    if streaming:
        source = HFStreamingSource(HFStreamingSourceConfig(path=tmp_path))
    else:
        source = HFEagerSource(HFEagerSourceConfig(path=tmp_path))
    pipeline = Pipeline(source=source, batch_size=10, num_threads=1)
    pipeline.step()
    (path,) = tmp_path.glob("*.arrow")
    whole = os.stat(path).st_size
    wait_for_threads(pipeline)
    os.truncate(path, 4096)
    with pytest.raises(ReadError, match=rf"{path} was cut to 4096 bytes and needs {whole}"):
        pipeline.scan(lambda batch: batch["id"].sum(), 9_000)


@pytest.mark.spec("SRC-036")
def test_a_look_at_mapped_files_that_was_held_up_does_not_put_off_the_next(tmp_path, monkeypatch):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(100))
    clock = iter([0.0, 0.001, 1.0, 3.0, 3.01, 3.1])  # the look at 1.0 takes two seconds
    monkeypatch.setattr(_storage, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    files = _storage.MappedFiles([str(path)])
    files.check()
    os.truncate(path, 10)
    files.check()  # at 3.01 it rests
    with pytest.raises(OSError, match=r"mapped was cut to 10 bytes and needs 100"):
        files.check()


@pytest.mark.spec("SRC-036")
def test_what_is_written_into_a_mapped_file_is_looked_at_again(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    table = pa.table({"word": ["abc", "de", "f"] * 100})
    path = written(table, tmp_path / "a.arrow", 300)
    config = ArrowSourceConfig(paths=path, decode=lambda row: {"size": np.int32(len(row["word"]))})
    source = ArrowSource(config)
    assert source.get_batch_at(0, 3)["size"].tolist() == [3, 2, 1]
    os.utime(path, (1, 1))  # it may have been touched without being changed
    assert source.get_batch_at(0, 3)["size"].tolist() == [3, 2, 1]
    offsets = path.read_bytes().find(np.array([0, 3, 5, 6], "<i4").tobytes())
    with open(path, "r+b") as file:
        file.seek(offsets + 4)
        file.write(np.array([2**30, 2**30 + 5], "<i4").tobytes())
    with pytest.raises(ReadError, match=r"ArrowInvalid: .*out of bounds"):
        source.get_batch_at(0, 3)


@pytest.mark.spec("SRC-036")
def test_a_stream_of_arrow_that_ends_too_soon_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    table, path = pa.table({"id": np.arange(20)}), tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 10))
        between = file.tell()
        writer.write_table(table.slice(10))
    assert len(ArrowSource(ArrowSourceConfig(paths=path))) == 20
    old, legacy = tmp_path / "old.arrow", pa.ipc.IpcWriteOptions(use_legacy_format=True)
    with pa.ipc.new_stream(str(old), table.schema, options=legacy) as writer:
        writer.write_table(table)
    assert len(ArrowSource(ArrowSourceConfig(paths=old))) == 20
    os.truncate(path, between)
    with pytest.raises(FileError, match="ends without the mark of an Arrow stream's end: it is cu"):
        ArrowSource(ArrowSourceConfig(paths=path))


@pytest.mark.spec("SRC-036")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_data_set_that_ends_too_soon_is_refused(streaming, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    datasets.Dataset.from_dict({"id": list(range(3000))}).save_to_disk(tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    stream = pa.BufferReader(path.read_bytes())
    pa.ipc.open_stream(stream).read_next_batch()
    os.truncate(path, stream.tell())
    with pytest.raises(FileError, match=rf"{path}' ends without the mark of an Arrow stream's end"):
        if streaming:
            HFStreamingSource(HFStreamingSourceConfig(path=tmp_path))
        else:
            HFEagerSource(HFEagerSourceConfig(path=tmp_path))


@pytest.mark.spec("SRC-036")
def test_no_flipped_bit_of_the_metadata_of_parquet_loses_a_row(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet as pq

    table, path = pa.table({"id": pa.array(range(30), pa.int32())}), tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=10, store_schema=False)
    whole = path.read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = set()
    for place in range(start, len(whole) - 8):
        for bit in (0, 4):
            damaged, path = bytearray(whole), tmp_path / f"{place}.{bit}.parquet"
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                source = ArrowSource(ArrowSourceConfig(paths=path))
                rows = source.get_batch_at(0, len(source))
            except (FileError, FieldTypeError, ReadError) as error:
                refused.add(error.code)
            else:
                assert len(next(iter(rows.values()))) == 30
    assert refused >= {"file", "read"}


@pytest.mark.spec("SRC-033", "SRC-036")
def test_a_damaged_chunk_is_decoded_twice_for_a_batch_of_masked_rows(tmp_path, monkeypatch):
    path = cases.parquet(tmp_path / "x.parquet", n=4000, group=1000)
    data = bytearray(path.read_bytes())
    data[200] ^= 0x10
    path.write_bytes(data)
    config = ArrowSourceConfig(paths=path, on_error="mask", max_errors=1000)
    reader = ArrowSource(config).reader
    chunk = type(reader._chunks[0])
    tried, table = [], chunk.table
    monkeypatch.setattr(chunk, "table", lambda self, names: tried.append(0) or table(self, names))
    _, readable, errors = reader.rows_and_holes(np.arange(300), reader.element_spec)
    assert len(errors) == 300 and not readable.any()
    assert len(tried) == 2  # a second try may succeed
    reader.rows_and_holes(np.arange(300), reader.element_spec)  # a retry reads again
    assert len(tried) == 4


@pytest.mark.internal
@pytest.mark.parametrize("on_error", ["raise", "mask"])
def test_no_record_is_looked_at_on_its_own_once_the_program_ends(on_error, monkeypatch):
    reader = over(Broken(range(5, N))).source.reader
    ending = threading.Event()
    monkeypatch.setattr(_reader, "ENDING", ending)
    checked = type(reader).checked

    def last(self, records, spec):
        try:
            return checked(self, records, spec)
        finally:
            ending.set()  # after the batch has failed, before its records are read

    monkeypatch.setattr(type(reader), "checked", last)
    read = reader.rows if on_error == "raise" else reader.rows_and_holes
    with pytest.raises(_reader.EndingError):
        read(np.arange(10), reader.element_spec)


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("kind", ["string_view", "binary_view", "list"])
def test_columns_of_views_are_decoded(kind, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    words, types = ["a", "bc", "def"], {"list": pa.list_(pa.string_view())}
    rows = [[x] for x in words] if kind == "list" else [x.encode() for x in words]
    rows = words if kind == "string_view" else rows
    column = pa.array(rows, types.get(kind) or getattr(pa, kind)())
    path = written(pa.table({"x": column}), tmp_path / "a.parquet", 2)

    def decode(row):
        return {"size": np.int32(len(row["x"][0] if kind == "list" else row["x"]))}

    source = ArrowSource(ArrowSourceConfig(paths=path, decode=decode))
    assert source.get_batch_at(0, 3)["size"].tolist() == [1, 2, 3]


@pytest.mark.spec("SRC-033")
def test_a_damaged_chunk_says_nothing_of_the_shape_of_others(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet as pq

    lists = pa.array([None] * 5 + [[1, 2]] * 10, pa.list_(pa.int32()))
    path = tmp_path / "x.parquet"
    how = {"row_group_size": 5, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"v": lists}), path, write_page_checksum=True, **how)
    place = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    for i in range(20, 40):
        data[place + i] ^= 255
    path.write_bytes(data)
    source = ArrowSource(ArrowSourceConfig(paths=path, on_error="mask", max_errors=10))
    batch = Pipeline(source=source, batch_size=15).step()
    assert batch["mask"].tolist() == [False] * 10 + [True] * 5
    assert batch["v"].tolist() == [[0, 0]] * 10 + [[1, 2]] * 5


@pytest.mark.spec("SRC-033", "SRC-036")
def test_where_only_damaged_chunks_could_show_a_shape_the_damage_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    lists = pa.array([None] * 5 + [[1, 2]] * 5, pa.list_(pa.int32()))
    path = written(pa.table({"v": lists}), tmp_path / "x.parquet", 5)
    tables, chunk = [], type(ArrowSource(ArrowSourceConfig(paths=path)).reader._chunks[0])
    table = chunk.table

    def failing(self, names):
        tables.append(self.group)
        if self.group == 1:
            raise OSError("no such sector")
        return table(self, names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "table", failing)
        with pytest.raises(ReadError, match="OSError: no such sector"):
            ArrowSource(ArrowSourceConfig(paths=path, on_error="mask", max_errors=9))
    assert tables[-1] == 1


@pytest.mark.spec("SRC-033")
def test_a_chunk_that_fails_once_is_read(tmp_path, monkeypatch):
    path = cases.parquet(tmp_path / "x.parquet", n=40, group=10)
    config = ArrowSourceConfig(paths=path, on_error="mask", max_errors=10)
    source = ArrowSource(config)
    chunk, tries = type(source.reader._chunks[0]), []
    table = chunk.table

    def failing(self, names):
        tries.append(self.group)
        if tries.count(2) == 1 and self.group == 2:
            raise OSError("busy")
        return table(self, names)

    monkeypatch.setattr(chunk, "table", failing)
    _, readable, errors = source.reader.rows_and_holes(np.arange(10, 40), source.element_spec)
    assert readable.all() and not errors


@pytest.mark.spec("SRC-006")
def test_readers_that_fill_with_zeros_of_other_signs_are_not_equal(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    path = written(pa.table({"x": [1.0, None]}), tmp_path / "a.parquet", 2)
    one, same, other = (
        ArrowSource(ArrowSourceConfig(paths=path, fill={"x": x})).reader for x in (0.0, 0.0, -0.0)
    )
    assert one == same and hash(one) == hash(same) and one != other
    assert pickle.loads(pickle.dumps(other)) == other


@pytest.mark.spec("SRC-019")
def test_a_column_with_a_dot_in_its_name_is_no_part_of_another(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    table = pa.table({"a": [{"b": "x"}, {"b": "y"}], "a.b": [1, 2]})
    path = written(table, tmp_path / "a.parquet", 2)
    source = ArrowSource(ArrowSourceConfig(paths=path, columns=["a.b"]))
    assert source.get_batch_at(0, 2)["a.b"].tolist() == [1, 2]


@pytest.mark.spec("SRC-035")
def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FieldTypeError, match="has type object"):
        StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path / "x.npy"))
    evil = tmp_path / "evil.array_record"
    for decode in ("msgpack", "npz"):
        cases.array_record(evil, [pickle.dumps({"id": 1})] * 3)
        with pytest.raises((ValueError, TypeError)):
            ArrayRecordSource(ArrayRecordSourceConfig(paths=evil, decode=decode))


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("decode", ["msgpack", "npz"])
@pytest.mark.parametrize("raw", [b'{"id": 1}', np.arange(3.0).tobytes()], ids=["JSON", "floats"])
def test_a_record_of_another_format_is_told_to_be_decoded(tmp_path, raw, decode):
    path = tmp_path / "x.array_record"
    cases.array_record(path, [raw] * 3)
    with pytest.raises(
        ReadError, match=r"`encode` has not written it .* give `decode`, a function"
    ):
        ArrayRecordSource(ArrayRecordSourceConfig(paths=path, decode=decode))


@pytest.mark.internal
def test_a_folder_of_many_files_of_other_lengths_does_not_fill_the_screen(tmp_path):
    for i in range(100):
        np.save(tmp_path / f"{i:03}.npy", np.zeros(3 + (i == 7), np.int32))
    with pytest.raises(UnequalLengthsError, match=r"'007': 4, .*'019': 3\} and 80 more") as error:
        StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path))
    assert len(str(error.value)) < 1000


@dataclasses.dataclass
class Sample:
    x: int


@pytest.mark.spec("ERR-015")
@pytest.mark.parametrize(
    "value", [Sample(1), decimal.Decimal(1), {1, 2}], ids=lambda value: type(value).__name__
)
def test_an_object_that_is_no_number_is_called_by_its_type(value):
    with pytest.raises(FieldTypeError, match=f"for a {type(value).__name__} in it"):
        alone([{"x": value}] * 3)


@pytest.mark.internal
def test_a_decoder_that_there_is_not_is_refused(unchecked):
    decode: Any = "zip"
    with pytest.raises(ValueError, match=r"one of \['msgpack', 'npz'\] or a function .* got 'zip'"):
        ArrayRecordSourceConfig(paths="a.array_record", decode=decode)


@pytest.mark.spec("SRC-036")
def test_checksums_catch_a_flipped_byte(tmp_path):
    records = [encode({"id": np.full(2000, i, np.int32)}) for i in range(20)]
    path = cases.array_record(tmp_path / "x.array_record", records)
    data = bytearray(path.read_bytes())
    hits = 0
    for place in range(100, len(data) - 70_000, 5_000):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            source = ArrayRecordSource(ArrayRecordSourceConfig(paths=path))
            rows = source.reader.rows(np.arange(20), source.element_spec)["id"]
            np.testing.assert_array_equal(rows, np.repeat(np.arange(20), 2000).reshape(20, -1))
        except (FileError, ReadError):
            hits += 1
    assert hits > 0


@pytest.mark.spec("SRC-031", "SRC-036")
def test_an_array_record_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    records = [b"", *(np.random.default_rng(i).bytes(20_000) for i in range(60))]
    path = cases.array_record(tmp_path / "x.array_record", records)

    def decode(raw):
        return {"size": np.int32(len(raw))}

    source = ArrayRecordSource(ArrayRecordSourceConfig(paths=path, decode=decode))
    assert source.get_batch_at(0, 2)["size"].tolist() == [0, 20_000]
    os.truncate(path, 500_000)
    assert source.get_batch_at(1, 1)["size"].tolist() == [20_000]
    with pytest.raises(ReadError) as error:
        source.get_batch_at(0, 61)
    assert f"{path} was replaced or changed after it was opened" in str(error.value)


@pytest.mark.spec("SRC-036")
def test_page_checksums_of_parquet_are_verified(tmp_path):
    path = cases.parquet(tmp_path / "x.parquet", n=5000, group=1000)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    with pytest.raises((ReadError, FileError, OSError)):
        source = ArrowSource(ArrowSourceConfig(paths=path))
        for start in range(0, 5000, 1000):
            source.reader.rows(np.arange(start, start + 1000), source.element_spec)


@pytest.mark.spec("SRC-033")
@pytest.mark.parametrize("decode", [None, lambda row: {"id": row["id"]}], ids=["columns", "rows"])
def test_the_first_chunk_may_be_the_broken_one(decode, tmp_path):
    path = cases.parquet(tmp_path / "x.parquet", n=4000, group=1000)
    data = bytearray(path.read_bytes())
    data[200] ^= 0x10
    path.write_bytes(data)
    config = ArrowSourceConfig(paths=path, decode=decode, on_error="mask", max_errors=1000)
    pipeline = Pipeline(source=ArrowSource(config), batch_size=1000)
    assert [int(batch["mask"].sum()) for batch in pipeline] == [0, 1000, 1000, 1000]


@pytest.mark.spec("SRC-033")
def test_the_first_records_may_be_the_broken_ones():
    batches = list(over(Broken(range(17), 60), batch_size=20, on_error="mask", max_errors=17))
    assert [int(batch["mask"].sum()) for batch in batches] == [3, 20, 20]


@pytest.mark.spec("SRC-031", "SRC-036")
def test_a_parquet_file_that_is_replaced_while_it_is_read_is_named(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'arrow'")
    import pyarrow as pa

    table = pa.table({"age": np.arange(100), "pay": np.arange(100) + 10**6})
    path, other = tmp_path / "x.parquet", tmp_path / "new"
    how = {"row_group_size": 10, "compression": "none", "use_dictionary": False}
    pq.write_table(table, path, **how)
    pipeline = Pipeline(
        source=ArrowSource(ArrowSourceConfig(paths=path, cached_chunks=1)), batch_size=10
    )
    pipeline.step()
    pq.write_table(table.select(["pay", "age"]), other, **how)
    os.replace(other, path)
    pipeline.seek(epoch=0, offset=50)
    with pytest.raises(ReadError, match=r"x\.parquet was replaced or changed after it was opened"):
        pipeline.step()


@pytest.mark.spec("SRC-031", "SRC-036")
def test_a_prepared_data_set_that_is_damaged_is_named(tmp_path):
    path = cases.prepared_tfds(tmp_path)

    def open_(**how):
        return TFDSEagerSource(TFDSEagerSourceConfig(path=path, **how))

    with pytest.raises(EmptySourceError, match=r"the split 'train\[5:2\]' of .* holds none"):
        open_(split="train[5:2]")
    [shard] = [x for x in path.iterdir() if "array_record" in x.name]
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileError, match=r"array_record.* is a shard .*, and is missing"):
        open_()
    shard.write_bytes(kept)
    for name in ("features.json", "dataset_info.json"):
        kept = (path / name).read_bytes()
        (path / name).write_bytes(kept[:10])
        with pytest.raises(FileError, match="holds no prepared data set, or a damaged one"):
            open_()
        (path / name).write_bytes(kept)
    assert len(open_()) == N


@pytest.mark.spec("SRC-037")
@pytest.mark.parametrize(
    "extra, package, build",
    [
        (
            "array_record",
            "array_record.python.array_record_module",
            lambda path: ArrayRecordSource(ArrayRecordSourceConfig(paths=path)),
        ),
        ("arrow", "pyarrow", lambda path: ArrowSource(ArrowSourceConfig(paths=path))),
        ("hf", "datasets", lambda path: HFEagerSource(HFEagerSourceConfig(path=path))),
        ("hf", "datasets", lambda path: HFStreamingSource(HFStreamingSourceConfig(path=path))),
        (
            "tfds",
            "tensorflow_datasets",
            lambda path: TFDSEagerSource(TFDSEagerSourceConfig(path=path)),
        ),
        (
            "tfds",
            "tensorflow_datasets",
            lambda path: TFDSStreamingSource(TFDSStreamingSourceConfig(path=path)),
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra(extra, package, build, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes `import` fail
    path = tmp_path / "file.parquet"
    path.write_bytes(b"")
    with pytest.raises(ImportError, match=rf"pip install 'datarax-reference\[{extra}\]'"):
        build(path)


@pytest.mark.spec("SRC-037")
def test_importing_the_library_imports_no_extra():
    code = "import datarax, datarax.sources, sys, json; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in json.loads(out.stdout)}
    extras = {"pyarrow", "datasets", "tensorflow_datasets", "array_record", "torch", "grain"}
    assert not modules & extras


@pytest.mark.spec("SRC-030")
def test_reading_ahead_never_shows():
    # A seek, another `last_batch` and another state each discard what was read ahead.
    data = cases.columns()
    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=True), cases.rows())
    pipeline = Pipeline(source=source, batch_size=3, rngs=nnx.Rngs(4))
    steps = [np.asarray(pipeline.step()["id"]).tolist() for _ in range(8)]
    for at in (0, 9, 3, 21, 12):
        pipeline.seek(epoch=0, offset=at)
        batch = pipeline.step()
        assert np.asarray(batch["id"]).tolist() == steps[at // 3]
        np.testing.assert_array_equal(batch["x"], data["x"][np.asarray(batch["id"])])
        assert pipeline.cursor == divmod(at + 3, N)


@pytest.mark.spec("SRC-030")
def test_a_stage_that_the_user_changes_is_seen_in_the_next_batch():
    class Scale(nnx.Module):
        def __init__(self):
            self.by = nnx.Param(jnp.float32(1))

        def __call__(self, batch):
            return {"x": batch["x"] * self.by[...]}

    scale = Scale()
    source = RandomAccessSource(RandomAccessSourceConfig(), cases.rows())
    pipeline = Pipeline(source=source, stages=[scale], batch_size=1)
    expected = cases.columns()["x"]
    for i, batch in enumerate(pipeline):
        np.testing.assert_array_equal(batch["x"][0], expected[i] * (i + 1))
        scale.by[...] = jnp.float32(i + 2)


@pytest.mark.spec("SRC-038")
def test_stats_say_what_the_limit_was():
    import time

    class Slow(Broken):
        def __getitem__(self, i):
            time.sleep(0.01)
            return super().__getitem__(i)

    reading = over(Slow([]))
    for _ in reading:
        pass
    assert reading.stats().limit == "reading" and reading.stats().batches == 5
    computing = over(Broken([]))
    for _ in computing:
        time.sleep(0.2)  # far more than threads need to start on a busy machine
    assert computing.stats().limit == "computing"
    stepped = over(Slow([]))
    stepped.step()
    assert stepped.stats() == (0, 0.0, 0.0, 0)  # `stats` covers loops and scans only


@pytest.mark.spec("SRC-038")
@pytest.mark.parametrize("mode", ["for", "scan"])
def test_a_progress_bar_says_how_far_it_is(mode, capsys):
    pytest.importorskip("rich", reason="needs the extra 'progress'")
    source = RandomAccessSource(RandomAccessSourceConfig(), Broken([]))
    pipeline = Pipeline(source=source, batch_size=5, last_batch="pad", progress=True)
    if mode == "for":
        for _ in pipeline:
            pass
    else:
        pipeline.scan(lambda batch: batch["id"])
    assert "5 of 5" in capsys.readouterr().out
    if mode == "for":
        pipeline.seek(epoch=1, offset=12)
        assert len(list(pipeline)) == 3
        assert "3 of 3" in capsys.readouterr().out


@pytest.mark.spec("SRC-038")
def test_a_progress_bar_ends_with_a_loop_that_is_left(capsys):
    pytest.importorskip("rich", reason="needs the extra 'progress'")
    source = RandomAccessSource(RandomAccessSourceConfig(), Broken([]))
    for _ in Pipeline(source=source, batch_size=5, last_batch="pad", progress=True):
        break
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("rich"):  # a thread that draws a progress bar
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.spec("SRC-038", "SRC-027")
def test_the_bar_of_a_stream_has_no_end_to_name(capsys):
    pytest.importorskip("rich", reason="needs the extra 'progress'")
    source = IterableSource(IterableSourceConfig(), [1, 2, 3])
    assert len([*Pipeline(source=source, batch_size=1, progress=True)]) == 3
    shown = capsys.readouterr().out
    assert " 3 waiting" in shown and "None" not in shown


def nulls(kind: str):
    """A column with holes in the records 3 (a null), 8 and 9, if its type allows them."""
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    rows = [[i, i + 1] for i in range(N)]
    rows[3], rows[8], rows[9] = None, [8, None], [9]
    if kind == "numbers":
        rows = [
            i if row and len(row) == 2 and None not in row else None for i, row in enumerate(rows)
        ]
        return pa.array(rows, pa.int32())
    if kind == "fixed":
        rows[9] = [None, None]
        return pa.array(rows, pa.list_(pa.int32(), 2))
    if kind == "nested":
        return pa.array([row and [row, row] for row in rows], pa.list_(pa.list_(pa.int32())))
    return pa.array(rows, pa.list_(pa.int32()))


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["numbers", "lists", "fixed", "nested"])
def test_a_null_is_no_value(kind, form, first, tmp_path, caplog):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")

    table = pa.table({"x": nulls(kind), "id": pa.array(range(N), pa.int32())}).slice(first)
    path = written(table, tmp_path / f"data.{form}", 5)
    holes = [i - first for i in (3, 8, 9)]
    with pytest.raises(ReadError, match="'x' is null there, holds a null, or is a list") as caught:
        [*Pipeline(source=ArrowSource(ArrowSourceConfig(paths=path)), batch_size=4)]
    assert caught.value.record == holes[0]

    config = ArrowSourceConfig(paths=path, on_error="mask", max_errors=3)
    batches = [*Pipeline(source=ArrowSource(config), batch_size=4)]
    mask, x = (np.concatenate([np.asarray(b[k]) for b in batches]) for k in ("mask", "x"))
    assert np.flatnonzero(~mask).tolist() == holes
    assert not x[~mask].any()
    good = [row for i, row in enumerate(table["x"].to_pylist()) if i not in holes]
    np.testing.assert_array_equal(x[mask], good)


def written(table, path, rows):
    """The table in a file, so many rows in a row group or record batch."""
    import pyarrow as pa
    import pyarrow.parquet

    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.spec("SRC-031", "SRC-003")
@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "kind, value, other",
    [
        ("int32", -1, 7),
        ("uint8", 255, 7),
        ("float32", np.nan, 0.5),
        ("float32", np.inf, 0.5),
        ("float16", 0.1, 0.5),
        ("float32", 3, 0.5),
        ("bool_", True, False),
    ],
)
def test_a_null_is_what_it_is_filled_with(form, kind, value, other, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    kind = getattr(pa, kind)()
    numbers = pa.array([other, None, other, other, None], kind)
    lists = pa.array([[other, None], None, [other, other], [None, None], [other]], pa.list_(kind))
    path = written(pa.table({"x": numbers, "pair": lists}), tmp_path / f"a.{form}", 2)
    fill = {"x": value, "pair": value}
    config = ArrowSourceConfig(paths=path, fill=fill, on_error="mask", max_errors=2)
    (batch,) = Pipeline(source=ArrowSource(config), batch_size=5)
    # Row 1 has a null, row 4 a list that is too short.
    assert batch["mask"].tolist() == [True, False, True, True, False]
    kept = kind.to_pandas_dtype()
    for name, rows in (
        ("x", [other, 0, other, other, 0]),
        ("pair", [[other, value], [0, 0], [other, other], [value, value], [0, 0]]),
    ):
        assert batch[name].dtype == kept
        np.testing.assert_array_equal(batch[name], np.array(rows, kept))
    alone = ArrowSource(ArrowSourceConfig(paths=path, columns=["x"], fill={"x": value}))
    expected = np.array([other, value, other, other, value], kept)
    np.testing.assert_array_equal(alone.get_batch_at(0, 5)["x"], expected)
    again = dataclasses.replace(alone.config, shuffle=True)
    assert again.fill == alone.config.fill
    assert hash(ArrowSource(again).reader) == hash(alone.reader)


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("bad", [None, [1, [2, 3]], "a text"], ids=str)
@pytest.mark.parametrize("form", ["objects", "decoded"])
def test_what_the_first_record_holds_is_masked_as_in_any_other(form, bad, tmp_path):
    rows = [{"x": bad}, *({"x": [i, i]} for i in range(1, 5))]
    how = {"on_error": "mask", "max_errors": 1}
    if form == "objects":
        source = RandomAccessSource(RandomAccessSourceConfig(**how), rows)
    else:
        pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
        path = written(pa.table({"n": [*range(5)]}), tmp_path / "a.parquet", 2)
        config = ArrowSourceConfig(paths=path, decode=lambda row: rows[row["n"]], **how)
        source = ArrowSource(config)
    pipeline = Pipeline(source=source, batch_size=5)
    batch = pipeline.step()
    assert batch["x"].tolist() == [[i, i] for i in range(5)]
    assert batch["mask"].tolist() == [False, True, True, True, True]
    with pytest.raises(FieldTypeError, match="Field 'x' "):
        RandomAccessSource(RandomAccessSourceConfig(**how), rows[:1])


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"fill": {"y": 0}},
            "a.parquet' has no column 'y', for which `fill` has a value, only ['x', 'id'].",
        ),
        (
            {"fill": {"x": 1.5}},
            "Field 'x' has the Arrow type int32, which cannot hold `fill`: 1.5.",
        ),
        ({"fill": {"x": np.nan}}, "Arrow type int32, which cannot hold `fill`: nan."),
        ({"fill": {"x": 2**70}}, "cannot hold `fill`: 1180591620717411303424."),
        ({"fill": {"x": 1j}}, "`fill` has 1j for 'x', which is no number."),
        ({"fill": {"x": 2**40}}, "Arrow type int32, which cannot hold `fill`: 1099511627776."),
        (
            {"fill": {"id": 2**40}},
            "Field 'id' has type int64 and JAX would hold it as int32, which cannot hold `fill`: "
            "1099511627776. Fill with another value, or turn on jax_enable_x64 before.",
        ),
        (
            {"fill": {"id": 1}, "columns": ["x"]},
            "`fill` has a value for 'id', which `columns` leaves out.",
        ),
        ({"fill": {"x": "a"}}, "`fill` has 'a' for 'x', which is no number."),
        ({"fill": {"x": [1]}}, "`fill` has [1] for 'x', which is no number."),
        ({"fill": 0}, "`fill` is a dict of values by column, got 0."),
        (
            {"fill": {"x": 0}, "decode": dict},
            "`fill` has no effect on `decode`, which gets a null as None.",
        ),
    ],
)
def test_what_cannot_fill_a_null_is_told_so(unchecked, options, words, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    columns = {"x": pa.array([1, 2], pa.int32()), "id": [1, 2]}
    path = written(pa.table(columns), tmp_path / "a.parquet", 2)
    with pytest.raises(ValueError, match=re.escape(words)):
        ArrowSource(ArrowSourceConfig(paths=path, **options))


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "other, words",
    [
        ({"x": [1], "id": ["a"]}, "no error, since it is not read"),
        ({"id": [1]}, r"b\.{form}' has no column 'x', which the first file has, only \['id'\]"),
        (
            {"x": [1.5]},
            r"b\.{form}' has the column x float64\[\], which in the first file is x int64",
        ),
        ({"x": [[1]]}, "has the column x int64\\[0\\], which in"),
        ({"x": ["a"]}, r"b\.{form}' has the column x of the Arrow type string, which in the first"),
        ({"x": [None]}, r"b\.{form}' has the column x of the Arrow type null, which in the first"),
    ],
)
def test_files_with_other_columns_than_the_first_are_refused(form, other, words, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    for name, columns in {"a": {"x": [0, 1]}, "b": other}.items():
        table, path = pa.table(columns), tmp_path / f"{name}.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
    config = ArrowSourceConfig(paths=tmp_path, on_error="mask", max_errors=3)
    if words.startswith("no error"):
        assert ArrowSource(config).get_batch_at(0, 3)["x"].tolist() == [0, 1, 1]
        return
    with pytest.raises(ValueError, match=words.format(form=form)):
        ArrowSource(config)


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_rows_are_decoded_by_a_function_of_the_users_own(unchecked, form, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    words = ["1", "22", None, "4444"]
    table, path = pa.table({"word": words, "n": range(4)}), tmp_path / f"a.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)

    def decode(row):
        return {"number": int(row["word"]), "n": row["n"]}

    options = dict(paths=path, decode=decode)
    source = ArrowSource(ArrowSourceConfig(**options))
    found = source.get_batch_at(0, 2)
    assert (found["number"].tolist(), found["n"].tolist()) == ([1, 22], [0, 1])
    with pytest.raises(ReadError, match=r"record 2 of .*a\.(parquet|arrow): TypeError: int\(\)"):
        list(Pipeline(source=source, batch_size=4))
    source = ArrowSource(ArrowSourceConfig(**options, on_error="mask", max_errors=1))
    (batch,) = Pipeline(source=source, batch_size=4)
    assert batch["number"].tolist() == [1, 22, 0, 4444]
    only = ArrowSource(ArrowSourceConfig(paths=path, columns=["n"], decode=dict))
    assert list(only.element_spec) == ["n"]
    with pytest.raises(ValueError, match="`decode` is a function of a row, got 'npz'"):
        ArrowSourceConfig(paths=path, decode="npz")


@pytest.mark.spec("SRC-031")
def test_a_column_that_no_file_has_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(FileError, match=r"a\.parquet' has no column 'y', only \['x'\]\.$"):
        ArrowSource(ArrowSourceConfig(paths=tmp_path, columns=["y"]))


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("form", ["npy", "parquet", "array_record"])
def test_a_file_that_replaces_another_is_another(form, tmp_path):
    path = tmp_path / f"a.{form}"

    def write(width):
        rows = [{"data": np.full(width, i, np.float32)} for i in range(8)]
        if form == "npy":
            np.save(path, np.stack([row["data"] for row in rows]))
            return StreamingDiskSource(StreamingDiskSourceConfig(path=path))
        if form == "array_record":
            cases.array_record(path, [encode(row) for row in rows])
            return ArrayRecordSource(ArrayRecordSourceConfig(paths=path))
        pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"data": [[*row["data"]] for row in rows]}), path)
        return ArrowSource(ArrowSourceConfig(paths=path))

    def total(batch):
        return {"sum": batch["data"] @ jnp.ones(width)}

    for width in (3, 5):
        pipeline = Pipeline(source=write(width), stages=[total], batch_size=4)
        assert pipeline.node_specs["source"]["data"].shape == (4, width)
        assert pipeline.step()["sum"].tolist() == [i * width for i in range(4)]


@pytest.mark.spec("SRC-033")
def test_of_many_masked_records_some_are_listed(caplog):
    pipeline = over(Broken(range(5, 35), 40), batch_size=8, on_error="mask", max_errors=30)
    with caplog.at_level(logging.WARNING, "datarax"):
        list(pipeline)
    (text,) = [x.getMessage() for x in caplog.records]
    assert text.startswith("Masked in epoch 0: 30 of the records\n  RandomAccessSource, record 5 ")
    assert text.count("RandomAccessSource") == 20
    assert text.endswith("\n  and 10 more")


@pytest.mark.spec("SRC-019")
def test_a_tensor_comes_in_the_order_of_its_axes(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    values = np.arange(24, dtype=np.int32).reshape(4, 2, 3)
    kind = pa.fixed_shape_tensor(pa.int32(), (2, 3), permutation=[1, 0])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 6)
    column = pa.ExtensionArray.from_storage(kind, flat)
    pyarrow.parquet.write_table(pa.table({"x": column}), tmp_path / "data.parquet")
    more = pa.table({"x": column, "id": pa.array(range(4), pa.int32())})  # another schema
    pyarrow.parquet.write_table(more, tmp_path / "more.parquet")
    source = ArrowSource(ArrowSourceConfig(paths=tmp_path))
    assert len(source) == 8
    expected = column.to_numpy_ndarray()
    assert expected.shape == (4, 3, 2)
    np.testing.assert_array_equal(source.get_batch_at(0, 4)["x"], expected)


@pytest.mark.spec("SRC-003")
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_booleans_of_a_byte_are_booleans(form, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, 2, -1], pa.int8()))
    table = pa.table({"x": flags, "id": pa.array(range(4), pa.int32())})
    path = tmp_path / f"data.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    found = ArrowSource(ArrowSourceConfig(paths=path)).get_batch_at(0, 4)["x"]
    assert (found.dtype, found.tolist()) == (bool, [False, True, True, True])


LISTS = {
    "short": [[1], [1, 2], [3, 4], [5, 6]],
    "nested": [[[1, 1], [1, 1]], *[[[i], [i]] for i in range(3)]],
    "null": [None, None, [3, 4], [5, 6]],
}


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("form", ["parquet", "arrow", "datasets"])
@pytest.mark.parametrize("lists", LISTS)
def test_the_first_list_of_a_column_may_be_the_broken_one(lists, form, tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    n = 300  # more than are looked at of a data set, so that its first are null in "null"
    rows = LISTS[lists][:1] * (2 * n if lists == "null" else 1) + LISTS[lists][1:]
    broken = sum(row in (None, LISTS[lists][0]) for row in rows)
    table = pa.table({"x": rows, "id": pa.array(range(len(rows)), pa.int32())})
    path = tmp_path / f"data.{form}"

    def source(**config):
        if form == "datasets":
            datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
            return HFEagerSource(HFEagerSourceConfig(**config), datasets.Dataset(table))
        return ArrowSource(ArrowSourceConfig(paths=path, **config))

    if form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=n)
    elif form == "arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=n)
    with pytest.raises(ReadError, match="is a list of another length than others") as caught:
        Pipeline(source=source(), batch_size=4).step()
    assert caught.value.record == 0
    masking = Pipeline(source=source(on_error="mask", max_errors=broken), batch_size=len(rows))
    batch = masking.step()
    assert np.flatnonzero(~np.asarray(batch["mask"])).tolist() == [*range(broken)]
    np.testing.assert_array_equal(batch["x"][broken:], rows[broken:])


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_of_a_data_set_is_named_and_the_batches_before_it_come(streaming):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    rows = [[i, None if i == 12 else i] for i in range(N)]
    dataset = datasets.Dataset.from_dict({"x": rows})
    if streaming:
        source = HFStreamingSource(HFStreamingSourceConfig(), dataset)
    else:
        source = HFEagerSource(HFEagerSourceConfig(), dataset)
    pipeline, seen = Pipeline(source=source, batch_size=5), []
    for _ in range(2):
        with pytest.raises(ReadError, match=r"record 12.*: .*'x' is null there") as caught:
            for batch in pipeline:
                seen.append(batch["x"][:, 0].tolist())
        assert (caught.value.record, pipeline.cursor) == (12, (0, 10))
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def set_of(**kwargs):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    return datasets.Dataset.from_dict({"id": range(N), "x": range(N)}, **kwargs)


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "config, make, error, words",
    [
        ({}, lambda: set_of().with_transform(lambda rows: rows), ValueError, "transform .* stage"),
        (
            {"split": "test"},
            set_of,
            ValueError,
            "`split` is 'test', but what is given is a single split",
        ),
        ({"fields": "id"}, set_of, TypeError, "`fields` is a list of names, got 'id'"),
        ({}, lambda: [set_of()], TypeError, "takes a `datasets.Dataset`.*, got list"),
        ({"path": "x"}, set_of, ValueError, "either a data set or `path`"),
    ],
)
def test_what_would_not_be_read_as_it_is_meant_is_refused(config, make, error, words, streaming):
    source = (HFEagerSource, HFEagerSourceConfig)
    if streaming:
        source = (HFStreamingSource, HFStreamingSourceConfig)
    dataset = make()
    with pytest.raises(error, match=words):
        source[0](source[1](**config), dataset)


@pytest.mark.spec("SRC-031")
@pytest.mark.parametrize("content", [{}, {"dataset_info.json": "{"}, {"state.json": "{}"}])
def test_a_folder_without_a_data_set_is_named(content, tmp_path):
    pytest.importorskip("datasets", reason="needs the extra 'hf'")
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileError, match="holds no data set, or a damaged one") as caught:
        HFEagerSource(HFEagerSourceConfig(path=tmp_path))
    assert caught.value.file == str(tmp_path)


@pytest.mark.spec("SRC-019")
def test_the_columns_that_a_data_set_shows_are_its_fields():
    shown = set_of().with_format("numpy", columns=["id"])
    assert list(HFEagerSource(HFEagerSourceConfig(), shown).element_spec) == ["id"]


@pytest.mark.spec("SRC-033")
def test_every_epoch_that_a_batch_touches_is_reported(caplog):
    pipeline = over(Broken([1], n=3), batch_size=8, on_error="mask", max_errors=1)
    with caplog.at_level(logging.WARNING, "datarax"):
        for _ in range(3):
            pipeline.step()
    assert pipeline.stats().masked == 8
    assert [x.getMessage().partition(":")[0] for x in caplog.records] == [
        f"Masked in epoch {i}" for i in range(8)
    ]


@pytest.mark.internal
def test_a_pipeline_that_is_gone_keeps_nobodys_data():
    class Records(list):
        pass

    records = Records({"id": np.int32(i)} for i in range(8))
    seen = weakref.ref(records)
    pipeline = Pipeline(
        source=RandomAccessSource(RandomAccessSourceConfig(), records), batch_size=4
    )
    pipeline.step(), list(pipeline), pipeline.scan(lambda batch: batch, 2)
    del pipeline, records
    for _ in range(50):
        gc.collect()
        if seen() is None:
            break
        time.sleep(0.1)
    assert seen() is None


def mixed(data, **config):
    """Records of an object, and as many in memory."""
    memory = MemorySource(MemorySourceConfig(), {"id": np.full(len(data), 99, np.int32)})
    source = RandomAccessSource(RandomAccessSourceConfig(**config), data)
    mixture = MixDataSourcesConfig(num_sources=2, weights=[1, 1])
    return MixDataSourcesNode(mixture, [source, memory], rngs=nnx.Rngs(0))


def alone(data, **config):
    return RandomAccessSource(RandomAccessSourceConfig(**config), data, rngs=nnx.Rngs(0))


@pytest.mark.spec("SRC-031", "ERR-022")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("make", [alone, mixed])
def test_random_access_names_what_it_cannot_read(make, shuffle, capfd):
    data = Broken([3])
    source = make(data, shuffle=shuffle)
    with pytest.raises(ReadError, match=r"read record 3 of Broken.*no record 3") as caught:
        source.get_batch_at(0, len(source))
    assert (caught.value.record, type(caught.value.__cause__)) == (3, OSError)
    data.bad.clear()
    found = np.asarray(source.get_batch_at(0, len(source))["id"])
    assert set(range(1, N + 1)) <= set(found.tolist())
    assert capfd.readouterr() == ("", "")


@pytest.mark.spec("SRC-031", "SRC-033")
@pytest.mark.parametrize("shuffle", [False, True])
def test_random_access_has_no_mask_and_so_masks_nothing(shuffle):
    source = alone(Broken([3, 17]), shuffle=shuffle, on_error="mask", max_errors=2)
    with pytest.raises(ReadError, match="no record "):
        source.get_batch_at(0, N)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no record "):
        jax.jit(lambda: source.get_batch_at(0, N))()["id"].block_until_ready()
    (batch,) = Pipeline(source=source, batch_size=N)
    assert batch["mask"].sum() == N - 2
    readable = alone(Broken([3]), on_error="mask", max_errors=1)
    assert readable.get_batch_at(4, 3)["id"].tolist() == [5, 6, 7]


@pytest.mark.spec("SRC-015", "SRC-019")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("make", [alone, mixed])
def test_random_access_gives_the_same_in_a_program_and_outside_of_any(make, shuffle):
    source = make(Broken([]), shuffle=shuffle)
    compiled = jax.jit(lambda start: source.get_batch_at(start, 7))
    for start in 0, 5, 2 * N - 3:
        found = source.get_batch_at(start, 7)
        assert isinstance(found["id"], jax.Array)
        assert found["id"].tolist() == compiled(jnp.uint32(start))["id"].tolist()


@pytest.mark.internal
def test_random_access_keeps_neither_objects_nor_files(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(8, dtype=np.int32))
    readers = weakref.WeakSet()
    for shuffle in False, True:
        for source in (
            StreamingDiskSource(
                StreamingDiskSourceConfig(path=tmp_path / "x.npy", shuffle=shuffle),
                rngs=nnx.Rngs(0),
            ),
            alone(Broken([]), shuffle=shuffle),
            alone(Broken([]), shuffle=shuffle, on_error="mask", max_errors=1),
            mixed(Broken([]), shuffle=shuffle),
        ):
            source.get_batch_at(0, 3)
            readers.add(source)
            readers.update(x for x in [source.reader] if x is not None)
    del source
    gc.collect()
    assert not list(readers)
