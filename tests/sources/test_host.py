"""Sources on the host: readers of users too, their checks, and sources of 2**32 records."""

import dataclasses
import io
import itertools
import pickle
import re
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx

from datarax import Pipeline
from datarax.errors import EmptySourceError, FieldTypeError, FileError, ReadError, SourceError
from datarax.sources import (
    ArrayRecordSource,
    ArrayRecordSourceConfig,
    ArrowSource,
    ArrowSourceConfig,
    HostSource,
    HostSourceConfig,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    Reader,
    Stream,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
    StreamSource,
    encode,
)
from datarax.sources._codec import DECODERS
from datarax.sources._disk import PAGE

from .cases import array_record


@dataclasses.dataclass(frozen=True)
class Squares(Reader):
    """A user's own reader."""

    n: int

    def __len__(self):
        return self.n

    @property
    def stored_spec(self):
        return {"square": jax.ShapeDtypeStruct((), np.dtype(np.int32))}

    def read(self, records):
        return {"square": records.astype(np.int32) ** 2}


@pytest.mark.spec("SRC-019")
def test_a_field_without_items_passes_all_modes(tmp_path):
    np.save(tmp_path / "id.npy", np.arange(10, dtype=np.int32))
    np.save(tmp_path / "none.npy", np.zeros((10, 3, 0), np.float32))
    pipeline = Pipeline(
        source=StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path)), batch_size=5
    )
    assert [batch["none"].shape for batch in pipeline] == [(5, 3, 0)] * 2
    assert pipeline.step()["none"].shape == (5, 3, 0)
    batches = pipeline.scan(lambda batch: batch)
    assert (batches["none"].shape, batches["id"].tolist()) == ((1, 5, 3, 0), [[5, 6, 7, 8, 9]])


@pytest.mark.spec("SRC-019")
def test_a_reader_of_your_own_is_ten_lines():
    pipeline = Pipeline(source=HostSource(Squares(10), HostSourceConfig()), batch_size=4)
    assert [np.asarray(b["square"]).tolist() for b in pipeline] == [
        [0, 1, 4, 9],
        [16, 25, 36, 49],
        [64, 81],
    ]


class Numbers:
    """A source of any length; the value of a record is its number, in two words."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"high": np.uint32(i >> 32), "low": np.uint32(i & 0xFFFFFFFF)}


@pytest.mark.spec("SHUF-014")
def test_more_than_2_to_the_32_records():
    n, seed = 2**32 + 11, 3
    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=True), Numbers(n))
    with pytest.raises(SourceError, match="jax_enable_x64"):
        Pipeline(source=source, batch_size=2, rngs=nnx.Rngs(seed))
    offsets = [n - 3, n - 2, n - 1]
    base = model.base_key(seed)
    expected = [
        *model.order(model.epoch_key(base, 0), n, offsets).tolist(),
        *model.order(model.epoch_key(base, 1), n, [0, 1, 2]).tolist(),
    ]
    with jax.enable_x64(True):
        for mode in ("step", "scan"):
            pipeline = Pipeline(source=source, batch_size=3, rngs=nnx.Rngs(seed))
            pipeline.seek(epoch=0, offset=n - 3)
            if mode == "step":
                batches = [pipeline.step(), pipeline.step()]
                batch = {k: np.concatenate([x[k] for x in batches]) for k in batches[0]}
            else:
                batch = {
                    k: np.concatenate(x) for k, x in pipeline.scan(lambda batch: batch, 2).items()
                }
            found = [
                int(h) << 32 | int(x) for h, x in zip(batch["high"], batch["low"], strict=True)
            ]
            assert found == expected, mode
            assert pipeline.cursor == (1, 3)


@pytest.mark.spec("SRC-005")
def test_a_value_that_does_not_fit_is_an_error_with_its_record():
    data = [{"id": np.int64(i)} for i in range(6)]
    data[4] = {"id": np.int64(2**40)}
    pipeline = Pipeline(source=RandomAccessSource(RandomAccessSourceConfig(), data), batch_size=2)
    assert pipeline.step()["id"].dtype == jnp.int32
    pipeline.step()
    with pytest.raises(ValueError, match=r"record 4 .*does not fit"):
        pipeline.step()


@pytest.mark.spec("SRC-005")
def test_records_that_jax_cannot_hold_are_refused_when_the_source_is_built():
    with pytest.raises(FieldTypeError, match="'name' holds str"):
        RandomAccessSource(RandomAccessSourceConfig(), [{"name": "a"}])


@pytest.mark.spec("SRC-005")
@pytest.mark.parametrize("stages", [[], [dict]], ids=["bare", "staged"])
@pytest.mark.parametrize("sized", [True, False], ids=["records", "stream"])
def test_wide_integers_pass_the_threads_as_they_are(sized, stages):
    data = [{"id": np.int64(2**40 + i)} for i in range(8)]
    with jax.enable_x64(True):  # in this thread only
        if sized:
            source = RandomAccessSource(RandomAccessSourceConfig(), data)
        else:
            source = IterableSource(IterableSourceConfig(), data)
        pipeline = Pipeline(source=source, stages=stages, batch_size=2)
        batches = [*pipeline, *(pipeline.step() for _ in range(2))]
        ids = np.concatenate([np.asarray(batch["id"]) for batch in batches])
        assert ids.tolist() == [2**40 + i for i in [*range(8), *range(4)]]
        scanned = pipeline.scan(lambda batch: batch["id"], 2)
        assert scanned.tolist() == [[2**40 + 4, 2**40 + 5], [2**40 + 6, 2**40 + 7]]


@pytest.mark.spec("SRC-003")
def test_files_of_any_layout_arrive_as_they_are(tmp_path):
    data = np.arange(60, dtype=np.float64).reshape(10, 3, 2)
    for name, x in {
        "c": data,
        "fortran": np.asfortranarray(data),
        "big": data.astype(">f4"),
        "flag": data[:, 0, 0] > 4,
        "empty": np.zeros((10, 0), np.float32),
    }.items():
        np.save(tmp_path / f"{name}.npy", x)
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path))
    batch = source.get_batch_at(7, 5, None)
    order = [7, 8, 9, 0, 1]
    for name in ("c", "fortran", "big"):
        assert batch[name].dtype == jnp.float32
        np.testing.assert_array_equal(batch[name], data[order].astype(np.float32))
    np.testing.assert_array_equal(batch["flag"], data[order, 0, 0] > 4)
    assert batch["empty"].shape == (5, 0)


@pytest.mark.spec("SRC-003")
@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("width", [3, PAGE // 4], ids=["narrow", "wide"])
@pytest.mark.parametrize("records", [[2, 3, 4, 5], [2, 4, 3, 5], [5, 4, 3, 2], [9]], ids=str)
def test_rows_come_in_the_order_asked_for(tmp_path, layout, width, records):
    data = np.arange(10 * width, dtype=np.float32).reshape(10, width)
    np.save(tmp_path / "x.npy", data.copy(layout))
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path / "x.npy"))
    batch = source.reader.read(np.array(records, np.uint32))
    np.testing.assert_array_equal(batch["data"], data[records])


@pytest.mark.spec("SRC-003")
@pytest.mark.parametrize("width", [3, PAGE // 4], ids=["narrow", "wide"])
def test_parts_are_read_as_one(tmp_path, width):
    data = np.arange(40 * width, dtype=np.float32).reshape(40, width)
    ends = [0, 11, 12, 12, 33, 40]
    paths = [tmp_path / f"{i}.npy" for i in range(len(ends) - 1)]
    for path, begin, end in zip(paths, ends[:-1], ends[1:], strict=True):
        np.save(path, data[begin:end])
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=paths))
    assert len(source) == 40
    for records in ([*range(40)], [*range(9, 14)], [11], [39, 0, 12, 11, 38, 1], [13, 14, 2, 15]):
        batch = source.reader.read(np.array(records, np.uint32))
        np.testing.assert_array_equal(batch["data"], data[records])


@pytest.mark.internal
def test_pipelines_over_lists_of_files_share_their_programs(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10, dtype=np.int32))
    pipelines = []
    for _ in range(2):
        config = StreamingDiskSourceConfig(path=[tmp_path / "x.npy"])
        assert config.path == (tmp_path / "x.npy",)
        pipelines.append(Pipeline(source=StreamingDiskSource(config), batch_size=2))
    one, other = (pipeline._runtime.look(pipeline).structure for pipeline in pipelines)
    assert one is other


@pytest.mark.internal
@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("records", [[1, 2, 3], [3, 1, 2]], ids=str)
def test_a_read_needs_no_more_memory_than_its_rows(tmp_path, layout, records):
    np.save(tmp_path / "x.npy", np.zeros((1000, 2 * PAGE), np.uint8, layout))
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path / "x.npy"))
    tracemalloc.start()
    source.reader.read(np.array(records, np.uint32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * PAGE


class Masked(Squares):
    """A reader of values that are not all there."""

    def read(self, records):
        return {"square": np.ma.masked_array(super().read(records)["square"], records % 2 == 1)}


@pytest.mark.spec("SRC-031", "ERR-015", "SRC-019")
@pytest.mark.parametrize("mode", ["for", "step", "scan"])
def test_what_a_reader_masks_is_refused_by_name_in_every_mode(mode):
    pipeline = Pipeline(source=HostSource(Masked(10), HostSourceConfig()), batch_size=4)
    with pytest.raises(ReadError, match=r"record 0 .*Field 'square' is a masked array"):
        match mode:
            case "for":
                next(iter(pipeline))
            case "step":
                pipeline.step()
            case "scan":
                pipeline.scan(lambda batch: batch, 2)


@pytest.mark.spec("SRC-031", "ERR-015")
def test_what_a_stream_masks_is_refused_by_name():
    class Own(Stream):
        def __init__(self, *records):
            super().__init__()
            self.records = records

        def begin(self, epoch, skip):
            yield from self.records[skip:]

    whole, masked = {"x": np.array([1])}, {"x": np.ma.array([1], mask=[True])}
    with pytest.raises(FieldTypeError, match="Field 'x' is a masked array"):
        Pipeline(source=StreamSource(Own(masked)), batch_size=1)
    pipeline = Pipeline(source=StreamSource(Own(whole, masked)), batch_size=1)
    with pytest.raises(ReadError, match=r"record 1.*Field 'x' is a masked array"):
        list(pipeline)


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("stages", [[], [dict]], ids=["bare", "staged"])
def test_a_reader_may_write_to_the_records_that_it_gets(shuffle, stages):
    @dataclasses.dataclass(frozen=True)
    class Careless(Squares):
        def read(self, records):
            rows = super().read(records)
            records[:] = 0
            return rows

    def epoch(reader):
        source = HostSource(reader, HostSourceConfig(shuffle=shuffle))
        pipeline = Pipeline(source=source, stages=stages, batch_size=3, rngs=nnx.Rngs(0))
        return [np.asarray(batch["square"]).tolist() for batch in pipeline]

    assert epoch(Careless(50)) == epoch(Squares(50))


@pytest.mark.spec("SRC-030")
def test_threads_share_one_cursor():
    source = RandomAccessSource(RandomAccessSourceConfig(), [{"id": i} for i in range(200)])
    pipeline = Pipeline(source=source, batch_size=4)
    iterator, taken = iter(pipeline), []

    def take():
        for batch in iterator:
            taken.append(np.asarray(batch["id"]).tolist())

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sum(taken, [])) == list(range(200))  # noqa: RUF017  (fifty short lists)


@pytest.mark.spec("SRC-030")
def test_reading_ahead_is_bounded():
    class Counted:
        reads = 0

        def __len__(self):
            return 1000

        def __getitem__(self, i):
            type(self).reads += 1
            return {"x": np.zeros(2**18, np.float32)}  # 1 MB

    source = RandomAccessSource(RandomAccessSourceConfig(), Counted())
    pipeline = Pipeline(source=source, batch_size=8)
    pipeline.step()
    for _ in range(20):
        threading.Event().wait(0.02)
    assert Counted.reads <= 1 + 8 + 64 + 8


@pytest.mark.internal
def test_equal_pipelines_share_what_is_compiled(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(40, dtype=np.int32))
    traced = []

    def stage(batch):
        traced.append(1)
        return batch

    for _ in range(2):
        source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path / "x.npy"))
        pipeline = Pipeline(source=source, stages=[stage], batch_size=4)
        before = len(traced)
        pipeline.step()
    assert len(traced) == before


ROWS = {
    "a list": {"x": [1.5, 2.5]},
    "a tuple": {"x": (1.5, 2.5)},
    "nested lists": {"a": {"x": [[1], [2]]}},
    "numbers": {"x": 1, "y": 2.5},
    "an array": np.float32([1, 2]),
    "lists alone": [1, 2],
}


@pytest.mark.spec("SRC-019", "SRC-017")
@pytest.mark.parametrize("row", ROWS)
def test_records_come_as_they_do_from_memory(row):
    records = [ROWS[row]] * 7
    expected = next(
        iter(Pipeline(source=MemorySource(MemorySourceConfig(), records), batch_size=4))
    )
    sources = [
        RandomAccessSource(RandomAccessSourceConfig(), records),
        IterableSource(IterableSourceConfig(), records),
    ]
    for source in sources:
        batch = Pipeline(source=source, batch_size=4).step()
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


@pytest.mark.spec("ERR-013")
def test_records_without_a_field_are_none(tmp_path):
    class Nothing(Squares):
        @property
        def stored_spec(self):
            return {}

    paths = array_record(tmp_path / "0.array_record", [encode({"x": 1})] * 5)
    config = ArrayRecordSourceConfig(paths=paths, decode=lambda data: {})
    for make in (
        lambda: RandomAccessSource(RandomAccessSourceConfig(), [{}] * 5),
        lambda: ArrayRecordSource(config),
        lambda: HostSource(Nothing(5), HostSourceConfig()),
        lambda: Pipeline(source=IterableSource(IterableSourceConfig(), [{}] * 5), batch_size=2),
    ):
        with pytest.raises(EmptySourceError) as error:
            make()
        assert str(error.value) == "Records must have at least one field, but these have none."
    with pytest.raises(ValueError, match=r"`fields` names at least one, .*, got \(\)"):
        RandomAccessSource(RandomAccessSourceConfig(fields=()), [{"x": 1}] * 5)
    with pytest.raises(ValueError, match=r"`columns` names at least one, .*, got \(\)"):
        ArrowSource(ArrowSourceConfig(paths="x.parquet", columns=()))


@pytest.mark.spec("ERR-023", "ERR-015")
@pytest.mark.parametrize("spec", ["int32", ((), np.float32), np.dtype(np.int32)], ids=str)
def test_a_spec_that_is_none_is_told_what_to_be(spec):
    class Named(Squares):
        @property
        def stored_spec(self):
            return {"x": spec}

    with pytest.raises(FieldTypeError) as error:
        HostSource(Named(5), HostSourceConfig())
    assert re.fullmatch(
        r"Field 'x[.1]*' has .* as its spec, which must be its shape and type: "
        r"jax\.ShapeDtypeStruct\(shape, dtype\)\.",
        str(error.value),
    )


@pytest.mark.spec("ERR-023", "SRC-003")
def test_what_formats_cannot_name_is_told_how_to_be_stored(tmp_path):
    x = np.zeros(3, ml_dtypes.bfloat16)
    with pytest.raises(TypeError) as error:
        encode({"x": x})
    assert str(error.value) == (
        "Field 'x' must hold numbers of a type of NumPy's own, got bfloat16. Encode text as "
        "numbers, and bfloat16 as float32, or as `x.view(np.uint16)` that `decode` views back."
    )
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(FieldTypeError) as error:
        StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path))
    assert str(error.value) == (
        "Field 'x' has type |V2, bytes of a type whose name is lost, such as bfloat16. Store it as "
        "float32, or `x.view(np.uint16)` to be viewed back in a stage."
    )
    np.save(tmp_path / "x.npy", x.view(np.uint16))
    source = StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path))
    back = Pipeline(
        source=source, batch_size=3, stages=[lambda batch: {"x": batch["x"].view(jnp.bfloat16)}]
    )
    assert back.step()["x"].dtype == jnp.bfloat16


@pytest.mark.spec("ERR-023", "SRC-031")
def test_columns_of_one_name_are_named(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    table = pa.table([[1, 2], [3, 4], [5, 6]], names=["x", "x", "y"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(FileError, match=r"x\.parquet' has several columns 'x'\. Give each"):
        ArrowSource(ArrowSourceConfig(paths=tmp_path))
    source = ArrowSource(ArrowSourceConfig(paths=tmp_path, columns=("y",)))
    assert source.get_batch_at(0, 2)["y"].tolist() == [5, 6]


@pytest.mark.spec("SRC-001", "ERR-015")
def test_no_two_fields_have_one_name():
    for record in ({0: 1, "0": 2}, {"a": {0: 1}}):
        for make in (
            lambda rows: MemorySource(MemorySourceConfig(), rows),
            lambda rows: RandomAccessSource(RandomAccessSourceConfig(), rows),
            lambda rows: Pipeline(
                source=IterableSource(IterableSourceConfig(), rows), batch_size=1
            ),
        ):
            with pytest.raises(FieldTypeError, match="'0' must have a string as its name, got 0"):
                make([record] * 4)
    twice = r"`fields` names at least one, and none of them twice, got \('a', 'a'\)"
    with pytest.raises(ValueError, match=twice):
        RandomAccessSource(RandomAccessSourceConfig(fields=("a", "a")), [(1, 2)] * 4)
    with pytest.raises(ValueError, match=twice):
        IterableSource(IterableSourceConfig(fields=("a", "a")), [(1, 2)] * 4)
    with pytest.raises(ValueError, match=twice.replace("fields", "columns")):
        ArrowSource(ArrowSourceConfig(paths="x.parquet", columns=("a", "a")))


@pytest.mark.spec("SRC-031", "ERR-015")
@pytest.mark.parametrize(
    "value, words",
    [
        (None, "is None"),
        ([1, None], "has type object, for None in it, which JAX cannot hold"),
        (np.ma.masked_array([1, 2], [False, True]), "is a masked array"),
        ([[1], [1, 2]], "rows of different shapes"),
    ],
)
def test_what_is_no_value_is_refused_by_name(value, words):
    def over(records, **config):
        return RandomAccessSource(RandomAccessSourceConfig(**config), records)

    with pytest.raises(FieldTypeError, match=f"Field 'x' .*{words}"):
        encode({"x": value})
    for records in ([{"x": value}], [{"a": {"x": value}}], [(value,)]):
        for make in (over, lambda records: IterableSource(IterableSourceConfig(), records)):
            with pytest.raises(FieldTypeError, match=words):
                Pipeline(source=make(records), batch_size=1)
    good = np.asarray([1, 2])
    later = [{"x": good}, {"x": value}, {"x": good}]
    with pytest.raises(ReadError, match=rf"record 1 of list.*Field 'x' .*{words}"):
        Pipeline(source=over(later), batch_size=3).step()
    batch = Pipeline(source=over(later, on_error="mask", max_errors=1), batch_size=3).step()
    assert batch["mask"].tolist() == [True, False, True]


@pytest.mark.spec("SRC-019")
def test_a_record_is_encoded_whole_or_not_at_all():
    record = {"x": [1, 2], "a": {"b": np.float32(3)}}
    for form in ("msgpack", "npz"):
        found = DECODERS[form](encode(record, form))
        assert {k: x.tolist() for k, x in found.items()} == {"x": [1, 2], "a.b": 3.0}
    names = {"file", "args", "kwds", "allow_pickle", "x", "x.npy", "arr_0", "", "a/b", "ä ö"}
    record = {name: np.int32(i) for i, name in enumerate(sorted(names))}
    for form in ("msgpack", "npz"):
        found = DECODERS[form](encode(record, form))
        assert {name: (x.dtype, x.tolist()) for name, x in found.items()} == {
            name: (np.int32, int(i)) for name, i in record.items()
        }
    with np.load(io.BytesIO(encode({"x": [[1, 2]], "y": 0.5}, "npz"))) as archive:
        assert {name: x.tolist() for name, x in archive.items()} == {"x": [[1, 2]], "y": 0.5}
    with pytest.raises(ValueError, match="Two fields have one name"):
        encode({"a.b": 1, "a": {"b": 2}})


@pytest.mark.spec("SRC-019")
def test_what_cannot_be_indexed_or_iterated_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"`__getitem__`, got generator\..* for IterableSource"):
        RandomAccessSource(RandomAccessSourceConfig(), (i for i in range(3)))
    with pytest.raises(TypeError, match=r"takes an iterable, or a function .*, got int"):
        IterableSource(IterableSourceConfig(), 3)
    with pytest.raises(ValueError, match=r"`form` is one of .*, got 'pickle'"):
        encode({"x": 1}, "pickle")


@pytest.mark.spec("SRC-019")
def test_parts_of_a_host_source_in_another_order_or_of_another_kind_are_refused(unchecked):
    class Unhashable(Squares):
        __hash__ = None  # as in a dataclass that is not frozen

    with pytest.raises(TypeError, match="`reader` must be of type Reader, got HostSourceConfig"):
        HostSource(HostSourceConfig(), Squares(3))
    with pytest.raises(TypeError, match="`config` must be of type HostSourceConfig, got dict"):
        HostSource(Squares(3), {})
    with pytest.raises(TypeError, match=r"(?s)must be hashable.*frozen dataclass of paths"):
        HostSource(Unhashable(3), HostSourceConfig())


@pytest.mark.spec("SRC-019", "STATE-001")
def test_what_is_assigned_to_a_source_on_the_host_shows_in_the_next_batch(tmp_path):
    records = np.arange(16, dtype=np.int32)
    np.save(tmp_path / "id.npy", records)

    def batches(source):
        pipeline = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0))
        taken = [pipeline.step()["id"].tolist()]
        pipeline.source.shuffle = True
        taken += [pipeline.step()["id"].tolist() for _ in range(2)]
        return taken, pipeline.get_state()

    stored = batches(StreamingDiskSource(StreamingDiskSourceConfig(path=tmp_path)))
    held = batches(MemorySource(MemorySourceConfig(), {"id": records}))
    assert stored[0] == held[0] and stored[0][1] != [4, 5, 6, 7]
    assert stored[1]["fingerprint"]["order"] == held[1]["fingerprint"]["order"]


@pytest.mark.spec("SRC-033")
def test_a_source_that_comes_to_mask_masks_from_the_next_batch_on():
    def source(**config):
        records = [{"id": i} for i in range(4)] + [{"id": None}, *({"id": i} for i in range(5, 8))]
        return RandomAccessSource(RandomAccessSourceConfig(**config), records)

    pipeline = Pipeline(source=source(), batch_size=4, last_batch="pad")
    pipeline.step()
    pipeline.source = source(on_error="mask", max_errors=1)
    assert pipeline.step()["mask"].tolist() == [False, True, True, True]


@pytest.mark.spec("SRC-031", "ERR-023")
@pytest.mark.parametrize(
    "rows, text",
    [
        ({"square": [0, 1, 4, 9]}, "it has square list, and not square int32[1]"),
        ({"square": 3}, "it has square int, and not square int32[1]"),
        ({"square": None}, "it has square NoneType, and not square int32[1]"),
        ([1, 2], "it is of type list, and not a dict of arrays"),
        ({"a": {"b": 1}}, "it has the fields ['a.b'], and not ['square']"),
    ],
)
def test_what_a_reader_reads_is_named_as_it_is(unchecked, rows, text):
    @dataclasses.dataclass(frozen=True)
    class Odd(Squares):
        def read(self, records):
            return rows

    pipeline = Pipeline(source=HostSource(Odd(8), HostSourceConfig()), batch_size=4)
    with pytest.raises(ReadError) as caught:
        pipeline.step()
    assert text in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Sorting(Reader):
    """Sorts the records in place, to read them in the order of the storage."""

    bad: int = -1

    def __len__(self):
        return 12

    @property
    def stored_spec(self):
        return {"id": jax.ShapeDtypeStruct((), np.dtype(np.int32))}

    def read(self, records):
        back = np.argsort(np.argsort(records))
        records.sort()
        if self.bad in records:
            raise OSError("bad sector")
        return {"id": records.astype(np.int32)[back]}


@pytest.mark.spec("SRC-002", "SRC-031", "SRC-033")
def test_a_reader_may_write_to_the_records_that_it_is_asked_for():
    def made(bad=-1, **config):
        source = HostSource(Sorting(bad), HostSourceConfig(shuffle=True, **config))
        return Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0))

    expected = np.concatenate([batch["id"] for batch in made()])
    batches = list(made(7, on_error="mask", max_errors=1))
    ids, mask = (np.concatenate([batch[name] for batch in batches]) for name in ("id", "mask"))
    np.testing.assert_array_equal(mask, expected != 7)
    np.testing.assert_array_equal(ids, np.where(mask, expected, 0))
    with pytest.raises(ReadError) as caught:
        list(made(7))
    assert caught.value.record == 7
    rows = made().source.get_batch_at(0, 12, jax.random.key(0))["id"]
    assert sorted(rows.tolist()) == [*range(12)]


@pytest.mark.spec("SRC-019")
@pytest.mark.parametrize("order", ["<", ">"])
def test_records_may_have_their_bytes_in_either_order(order):
    data = np.arange(8).reshape(4, 2).astype(f"{order}f4")
    records = [{"x": row} for row in data]
    for source in (
        RandomAccessSource(RandomAccessSourceConfig(), records),
        IterableSource(IterableSourceConfig(), records),
    ):
        np.testing.assert_array_equal(Pipeline(source=source, batch_size=4).step()["x"], data)


class Drawn:
    """Computes its records in JAX."""

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"x": jnp.asarray(np.float32(i)) * 2}

    def __iter__(self):
        return (self[i] for i in range(10))


@dataclasses.dataclass(frozen=True)
class Specified(Squares):
    @property
    def stored_spec(self):
        return {"square": jax.ShapeDtypeStruct((), jnp.asarray(np.int32(0) + 1).dtype)}


@pytest.mark.spec("ERR-001", "SRC-020")
def test_what_is_read_may_be_computed_in_jax():
    indexed = RandomAccessSource(RandomAccessSourceConfig(), Drawn())
    for source in (
        indexed,
        pickle.loads(pickle.dumps(indexed)),
        IterableSource(IterableSourceConfig(), Drawn()),
    ):
        assert Pipeline(source=source, batch_size=3).step()["x"].tolist() == [0, 2, 4]
    copied = pickle.loads(pickle.dumps(Pipeline(source=indexed, batch_size=3)))
    assert nnx.jit(lambda pipeline: pipeline.step())(copied)["x"].tolist() == [0, 2, 4]
    assert Pipeline(source=HostSource(Specified(5), HostSourceConfig()), batch_size=2).step()


class Batches(Stream):
    """The batches of another pipeline, which it moves to the place that it is asked for."""

    def __init__(self):
        source = MemorySource(MemorySourceConfig(shuffle=True), np.arange(12))
        self.inner = Pipeline(source=source, batch_size=3, rngs=nnx.Rngs(1))

    def begin(self, epoch, skip):
        self.inner.seek(epoch=epoch)
        return itertools.islice(({"x": batch["data"]} for batch in self.inner), skip, None)


@pytest.mark.spec("ERR-001", "SRC-028")
def test_a_stream_may_be_what_another_pipeline_gives():
    def build():
        return Pipeline(source=StreamSource(Batches()), batch_size=2, rngs=nnx.Rngs(0))

    pipeline, resumed = build(), build()
    batches = [pipeline.step()["x"].tolist() for _ in range(6)]
    state = pipeline.get_state()
    assert sorted(np.ravel(batches[:2])) == [*range(12)]
    resumed.set_state(state)
    assert resumed.step()["x"].tolist() == pipeline.step()["x"].tolist()


@pytest.mark.spec("ITER-001")
def test_a_list_that_grows_keeps_its_epoch():
    data = [{"x": np.int32(i)} for i in range(10)]
    pipeline = Pipeline(source=RandomAccessSource(RandomAccessSourceConfig(), data), batch_size=4)
    data += data
    assert [len(batch["x"]) for batch in pipeline] == [4, 4, 2]


@dataclasses.dataclass(frozen=True)
class Rows(Squares):
    rows: int = 3


class Several:
    """A `__getitems__` that returns something else than a list of the records."""

    def __init__(self, found):
        self.found = found

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"x": np.int32(i)}

    def __getitems__(self, records):
        return self.found


@pytest.mark.spec("ERR-023")
def test_what_is_no_reader_or_list_of_records_is_told_so(unchecked):
    with pytest.raises(TypeError, match="`rows` is a method of every Reader, and Rows has a field"):
        HostSource(Rows(10), HostSourceConfig())
    several = Several({"x": np.int32(i)} for i in range(4))
    source = RandomAccessSource(RandomAccessSourceConfig(), several)
    assert Pipeline(source=source, batch_size=4).step()["x"].tolist() == [0, 1, 2, 3]
    for found, what in (({"x": np.arange(4)}, "a dict"), ([{"x": np.int32(1)}], "1")):
        source = RandomAccessSource(RandomAccessSourceConfig(), Several(found))
        text = rf"as many records as it is asked for, here \d, and has returned {what}"
        with pytest.raises(ReadError, match=text):
            Pipeline(source=source, batch_size=4).step()


@pytest.mark.spec("SRC-017")
@pytest.mark.parametrize("given", [None, 3, [None]])
@pytest.mark.parametrize(
    "option, make",
    [
        ("path", lambda x: StreamingDiskSource(StreamingDiskSourceConfig(path=x))),
        ("paths", lambda x: ArrowSource(ArrowSourceConfig(paths=x))),
        ("paths", lambda x: ArrayRecordSource(ArrayRecordSourceConfig(paths=x))),
    ],
)
def test_what_is_no_path_is_told_so(unchecked, option, make, given):
    kind = type(given[0] if isinstance(given, list) else given).__name__
    with pytest.raises(TypeError, match=f"^`{option}` is a path or a list of paths, and {kind} is"):
        make(given)


@pytest.mark.spec("SHUF-018")
@pytest.mark.parametrize("sizes", [{"block_size": 8}, {"window": 2}])
@pytest.mark.parametrize("shuffle", [True, "permutation"])
def test_sizes_of_blocks_are_refused_where_no_block_is_shuffled(sizes, shuffle):
    with pytest.raises(ValueError) as error:
        RandomAccessSourceConfig(shuffle=shuffle, **sizes)
    assert str(error.value) == (
        f'`block_size` and `window` are those of shuffle="blocks", got shuffle={shuffle!r}.'
    )
    assert RandomAccessSourceConfig(shuffle="blocks", **sizes) != RandomAccessSourceConfig(**sizes)
