"""Records in memory arrive unchanged, or an error names the field."""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import MODES, assert_same, by_step, ids, pipeline, rows
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from datarax import Pipeline, _keys
from datarax._host_memory import aligned
from datarax.errors import FieldTypeError
from datarax.sources import (
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    SourceData,
    _column,
)


def memory(data, **config):
    return MemorySource(MemorySourceConfig(**config), data)


def stored(source):
    """All records of a source, in stored order."""
    with jax.disable_jit():
        return jax.tree.map(np.asarray, source.gather(jnp.arange(len(source), dtype=jnp.uint32)))


# Forms of data.


@pytest.mark.spec("SRC-017", "SRC-001")
def test_data_come_in_four_forms():
    x, y = np.arange(6).reshape(3, 2), np.float32([1, 2, 3])
    expected = {"x": np.int32(x), "deep": {"y": y}}
    assert_same(stored(memory({"x": x, "deep": {"y": y}})), expected)
    records = [{"x": x[i], "deep": {"y": y[i]}} for i in range(3)]
    assert_same(stored(memory(records)), expected)
    assert_same(stored(memory(tuple(records))), expected)
    assert_same(stored(memory(x)), {"data": np.int32(x)})
    assert_same(stored(memory(jnp.int32(x))), {"data": np.int32(x)})
    assert_same(stored(memory({"x": x.tolist()})), {"x": np.int32(x)})
    assert_same(stored(memory([[1, 2], [3, 4]])), {"data": np.int32([[1, 2], [3, 4]])})


@pytest.mark.spec("SRC-017", "SRC-003")
def test_lists_in_records_are_rows():
    records = [{"tokens": [1, 2], "y": 0.5}, {"tokens": [3, 4], "y": 1.5}]
    expected = {"tokens": np.int32([[1, 2], [3, 4]]), "y": np.float32([0.5, 1.5])}
    assert_same(stored(memory(records)), expected)


NO_NUMBERS = {
    "ragged": {"x": [[1], [1, 2]]},
    "ragged records": [{"x": np.zeros(2)}, {"x": np.zeros(3)}],
    "ragged lists": [{"x": [1]}, {"x": [1, 2]}],
    "text": {"x": np.array(["a", "b"])},
    "bytes": {"x": np.array([b"a", b"b"])},
    "dates": {"x": np.array(["2020-01-01"], "datetime64[D]")},
    "structures": {"x": np.zeros(2, [("a", "i4")])},
    "objects": {"x": [object(), object()]},
    "array of objects": {"x": np.zeros(2, object)},
    "None": {"x": None},
    "scalar": {"x": 3},
    "NumPy scalar": {"x": np.float32(3)},
    "record of None": [{"x": 1}, {"x": None}],
    "long double": {"x": np.zeros(2, np.longdouble)},
}


@pytest.mark.spec("SRC-017", "ERR-015")
@pytest.mark.parametrize("data", NO_NUMBERS)
def test_what_is_no_array_of_numbers_is_refused_by_name(data):
    with pytest.raises(FieldTypeError) as error:
        memory(NO_NUMBERS[data])
    assert error.value.field == "x"


@pytest.mark.spec("ERR-015", "SRC-005")
def test_a_masked_array_is_refused():
    masked = np.ma.masked_array([1, 2, 3], [False, True, False])
    with pytest.raises(FieldTypeError) as error:
        memory({"x": masked})
    assert str(error.value) == (
        "Field 'x' is a masked array. Fill it, and give the mask as a field."
    )
    for data in (
        {"x": [masked, masked]},
        {"x": [[1.0, 2.0], [np.ma.masked, 3.0]]},
        [{"x": masked}, {"x": masked}],
        [{"x": [masked]}],
    ):
        with pytest.raises(FieldTypeError, match="Field 'x' is a masked array"):
            memory(data)


# Values.

TYPES = [
    np.bool_, np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32, np.float16, np.float32,
    ml_dtypes.bfloat16, np.complex64,
]  # fmt: skip


@pytest.mark.spec("ERR-015", "SRC-017")
@pytest.mark.parametrize("second", [np.zeros(4, np.int32), np.zeros((4, 2), np.float32)])
def test_a_tuple_of_arrays_is_no_data_set_of_as_many_records(second):
    pair = np.zeros((4, 2), np.float32), second
    for data, name in ((pair, "data"), ({"a": {"x": pair}}, "a.x")):
        with pytest.raises(FieldTypeError) as error:
            MemorySource(MemorySourceConfig(), data)
        assert str(error.value) == (
            f"Field '{name}' is a tuple of 2 arrays. Give each a name, in a dict of arrays; or for "
            "records one by one, a list."
        )


@pytest.mark.spec("SRC-005", "ERR-015")
@pytest.mark.parametrize(
    "data, field, value",
    [
        ({"x": [2**24 + 1, 0.5]}, "x", 2**24 + 1),
        ({"x": [[0.5, 1], [-(2**24) - 1, 0.5]]}, "x", -(2**24) - 1),
        ([{"x": 2**53 + 1}, {"x": 0.5}], "x", 2**53 + 1),
        ({"x": [np.int64(2**31 - 1), 1e30]}, "x", 2**31 - 1),
    ],
)
def test_an_integer_beside_floats_is_not_rounded(data, field, value):
    with pytest.raises(FieldTypeError) as error:
        memory(data)
    assert str(error.value) == (
        f"Field '{field}' has the integer {value} beside floats, and as float32 it would be "
        "rounded. Give integers and floats as two fields."
    )


@pytest.mark.spec("SRC-005")
@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1, 2**63 - 1])
def test_an_integer_that_numpy_has_rounded_is_seen_in_64_bits_too(value):
    with jax.enable_x64(True), pytest.raises(FieldTypeError, match=f"has the integer {value} bes"):
        memory([{"x": value}, {"x": 0.5}])
    with jax.enable_x64(True):
        assert stored(memory({"x": [2**53, 0.5]}))["x"].tolist() == [2.0**53, 0.5]


@pytest.mark.spec("SRC-005")
def test_floats_alone_are_rounded_however_large():
    found = stored(memory({"x": [1.7e9 + 1, 16777217.0], "y": [[2.0**24 + 1], [np.float64(0.5)]]}))
    assert found["x"].tolist() == [np.float32(1.7e9 + 1), 2.0**24]
    assert found["y"].tolist() == [[2.0**24], [0.5]]


@pytest.mark.spec("SRC-005")
def test_an_integer_beside_floats_is_a_float_where_that_is_exact():
    found = stored(memory({"x": [2**24, 0.5, 2**30, -3, True, 1e30, 16777217.0]}))
    assert found["x"].tolist() == [2.0**24, 0.5, 2.0**30, -3, 1, np.float32(1e30), 2.0**24]


@pytest.mark.spec("SRC-001", "SRC-017")
def test_records_that_are_tuples_have_their_parts_as_fields():
    images = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    found = stored(memory([(image, 16777217 + i, 0.5) for i, image in enumerate(images)]))
    expected = {"0": images, "1": np.arange(3) + 16777217, "2": np.full(3, 0.5)}
    assert {name: x.tolist() for name, x in found.items()} == {
        name: x.tolist() for name, x in expected.items()
    }
    indexed = RandomAccessSource(RandomAccessSourceConfig(), [(0.5, 1), (0.25, 3)])
    assert memory([(0.5, 1), (0.25, 3)]).element_spec == indexed.element_spec
    with pytest.raises(FieldTypeError) as error:
        memory([(1, 2), (1, 2, 3)])
    assert str(error.value) == (
        "Field '[1]' must be a tuple of 2 as the first record is, got (1, 2, 3)."
    )


@pytest.mark.spec("ERR-015", "SRC-017")
def test_a_table_is_no_array():
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    pd = pytest.importorskip("pandas", reason="comes with the extra 'hf'")
    table = pa.table({"x": [1, 2], "y": [0.5, 1.5]})
    for data, name in ((table, "Table"), (table.to_pandas(), "DataFrame")):
        with pytest.raises(FieldTypeError) as error:
            MemorySource(MemorySourceConfig(), data)
        assert str(error.value) == (
            f"Field 'data' is a {name}, whose columns would become one array. Give them by name, "
            "as {name: table[name] for name in names}."
        )
        for nested in ({"data": data}, [{"data": data}], {"data": [data, data]}):
            with pytest.raises(FieldTypeError) as other:
                memory(nested)
            assert str(other.value) == str(error.value)
        columns = {name: data[name] for name in ("x", "y")}
        batch = MemorySource(MemorySourceConfig(), columns).get_batch_at(1, 1)
        assert {name: x.tolist() for name, x in batch.items()} == {"x": [2], "y": [1.5]}
        with pytest.raises(TypeError) as error:
            RandomAccessSource(RandomAccessSourceConfig(), data)
        assert str(error.value) == (
            f"RandomAccessSource reads record i as data[i], but data[i] of a {name} is not a "
            "record. Its columns are for MemorySource. Give them by name, as "
            "{name: table[name] for name in names}."
        )
        with pytest.raises(FieldTypeError, match=f"Field 'x' is a {name}, whose columns"):
            RandomAccessSource(RandomAccessSourceConfig(), [{"x": data}])
    with pytest.raises(TypeError, match=r"data\[i\] of a Series is not a record"):
        RandomAccessSource(RandomAccessSourceConfig(), pd.Series([3, 4], index=[1, 0]))
    series = MemorySource(MemorySourceConfig(), pd.Series([3, 4]))
    assert series.get_batch_at(1, 1)["data"].tolist() == [4]


@pytest.mark.spec("ERR-015")
@pytest.mark.parametrize("rows", [[[1, 2], [3, 4], [5]], [np.zeros(2), np.zeros(2), np.zeros(1)]])
def test_the_first_row_of_another_shape_is_named(rows):
    with pytest.raises(FieldTypeError) as error:
        MemorySource(MemorySourceConfig(), {"x": rows})
    assert str(error.value) == (
        "Field 'x' has rows of different shapes: row 0 has (2,) and row 2 (1,). Pad or crop them "
        "to one."
    )
    with pytest.raises(FieldTypeError, match="Field 'x' has rows of different shapes: setting an"):
        MemorySource(MemorySourceConfig(), {"x": [[[1], [2, 3]], [[1], [2, 3]]]})


@pytest.mark.spec("SRC-003")
@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
def test_a_type_that_jax_holds_is_kept(dtype):
    x = np.arange(12).reshape(3, 2, 2).astype(dtype)
    assert_same(stored(memory({"x": x})), {"x": x})
    assert pipeline(source=memory({"x": x})).element_spec["x"] == jax.ShapeDtypeStruct(
        (4, 2, 2), dtype
    )


@pytest.mark.spec("SRC-003", "SRC-007")
@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(4, 3)[::-1],
        np.asfortranarray(np.arange(12, dtype=np.int32).reshape(4, 3)),
        np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2],
        np.arange(12, dtype=">i4").reshape(4, 3),
        np.frombuffer(b"0" + bytes(range(48)), np.uint8)[1:].view(np.int32).reshape(4, 3),
        np.broadcast_to(np.int32([1, 2, 3]), (4, 3)),
        np.arange(100, dtype=np.int32)[7:19].reshape(4, 3),
        np.zeros((4, 0, 3), np.int32),
    ],
    ids=[
        "reversed",
        "fortran",
        "strided",
        "big-endian",
        "unaligned",
        "broadcast",
        "inside",
        "flat",
    ],
)
def test_any_layout_of_an_array_is_read_and_left_as_it_was(array):
    kept = array.copy()
    array = array.view()
    array.flags.writeable = False
    source = memory({"x": array})
    assert_same(stored(source), {"x": np.ascontiguousarray(kept, np.dtype(kept.dtype.name))})
    by_step(pipeline(source=source, batch_size=3), 3)
    np.testing.assert_array_equal(array, kept)


INT64 = hnp.arrays(np.int64, st.integers(1, 5), elements=st.integers(-(2**63), 2**63 - 1))
UINT64 = hnp.arrays(np.uint64, st.integers(1, 5), elements=st.integers(0, 2**64 - 1))


@pytest.mark.spec("SRC-004", "SRC-005")
@settings(max_examples=60)
@given(INT64 | UINT64)
@example(np.int64([2**31 - 1, -(2**31)]))
@example(np.int64([2**31]))
@example(np.int64([0, -(2**31) - 1]))
@example(np.uint64([2**32 - 1]))
@example(np.uint64([0, 2**32]))
def test_integers_arrive_exact_or_not_at_all(values):
    narrow = np.dtype(np.int32 if values.dtype == np.int64 else np.uint32)
    limits = np.iinfo(narrow)
    bad = [i for i, v in enumerate(values.tolist()) if not limits.min <= v <= limits.max]
    if bad:
        with pytest.raises(FieldTypeError, match=f"record {bad[0]} does not fit") as error:
            memory({"deep": {"x": values}})
        assert error.value.field == "deep.x"
    else:
        assert_same(stored(memory({"x": values})), {"x": values.astype(narrow)})


WIDE = {
    "records": [{"x": 2**40 + 1}, {"x": 2**63 + 7}],
    "list": {"x": [1, 2**63 + 5, 3]},
    "list of lists": {"x": [[1, 2**63 + 5], [3, 4]]},
    "list of arrays": {"x": [np.int64([1]), np.uint64([2**63 + 5])]},
    "scalars": {"x": [np.int64(1), np.uint64(2**63 + 5)]},
}


@pytest.mark.spec("SRC-005")
@pytest.mark.parametrize("data", WIDE)
def test_integers_that_take_64_bits_are_never_floats(data):
    data = WIDE[data]
    values = data["x"] if isinstance(data, dict) else [row["x"] for row in data]
    with pytest.raises(FieldTypeError, match=r"'x' has type uint64 .* does not fit"):
        memory(data)
    with jax.enable_x64(True):
        found = stored(memory(data))["x"]
        assert (found.dtype, found.tolist()) == (np.uint64, np.asarray(values, object).tolist())
    with pytest.raises(FieldTypeError, match=r"'x' has integers below 0 and others from 2\*\*63"):
        memory({"x": [-1, 2**63]})
    assert_same(stored(memory({"x": [[], []]})), {"x": np.zeros((2, 0), np.float32)})
    assert_same(stored(memory({"x": [1, 0.5]})), {"x": np.float32([1, 0.5])})


def columns_with_nulls():
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    pd = pytest.importorskip("pandas", reason="comes with the extra 'hf'")
    for values in ([16777217, None, 3], [0.5, None, 1.5], [True, None, False]):
        yield pa.array(values)
        yield pa.chunked_array([values])
        yield pd.array(values)
        yield pd.Series(values, dtype=pd.array(values).dtype)
        yield pd.Series(values, dtype=pd.ArrowDtype(pa.array(values).type))
    yield pd.Series([1, None, 1], dtype="category")


@pytest.mark.spec("SRC-005", "ERR-015")
def test_a_column_with_nulls_is_refused_by_name():
    words = "Field 'x' has nulls, for which JAX has no value. Fill or drop them."
    for column in columns_with_nulls():
        for data in ({"x": column}, [{"x": column}] * 2, {"x": [column] * 2}):
            with pytest.raises(FieldTypeError) as error:
                memory(data)
            assert str(error.value) == words
        with pytest.raises(FieldTypeError) as error:
            RandomAccessSource(RandomAccessSourceConfig(), [{"x": column}] * 2)
        assert str(error.value) == words


@pytest.mark.spec("SRC-005", "SRC-006")
def test_a_column_of_a_table_without_nulls_keeps_its_values():
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    pd = pytest.importorskip("pandas", reason="comes with the extra 'hf'")
    for column in (
        pa.array([16777217, 3]),
        pa.chunked_array([[16777217], [3]]),
        pd.Series([16777217, 3], dtype="Int64"),
        pd.Series([16777217, 3], dtype="category"),
        pd.Series([16777217, 3], index=["a", "b"]),
    ):
        assert_same(stored(memory({"x": column})), {"x": np.int32([16777217, 3])})
    for column in (pd.Series([0.5, np.nan]), pd.Series([0.5, 1], dtype="Float64")):
        assert_same(stored(memory({"x": column})), {"x": np.asarray(column, np.float32)})


@pytest.mark.spec("SRC-006", "SRC-004")
@settings(max_examples=60)
@given(hnp.arrays(np.float64, st.integers(1, 5)))
@example(np.float64([np.nan, np.inf, -np.inf, -0.0]))
@example(np.float64([3.4028235677973366e38]))  # rounds up to infinity
@example(np.float64([3.4028235677973362e38]))  # rounds down to the largest float32
@example(np.float64([1e-300]))
def test_floats_arrive_nearest_or_not_at_all(values):
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    if (np.isinf(nearest) & np.isfinite(values)).any():
        with pytest.raises(FieldTypeError, match="has type float64 and JAX would hold it as"):
            memory({"x": values})
    else:
        got = stored(memory({"x": values}))["x"]
        np.testing.assert_array_equal(got, nearest)
        assert (np.signbit(got) == np.signbit(nearest)).all()


@pytest.mark.spec("SRC-005", "SRC-006", "SRC-003")
def test_with_64_bits_nothing_is_narrowed():
    data = {"i": np.int64([2**40]), "f": np.float64([1e300])}
    with jax.enable_x64(True):
        assert_same(stored(memory(data)), data)


# Sharing and copying.


@pytest.mark.spec("SRC-018")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [np.arange, lambda n: np.arange(n, dtype=np.int32)])
def test_a_private_copy_does_not_see_later_changes(make, mode):
    x = make(12)
    stream = pipeline(source=memory({"id": x}, copy=True), batch_size=4)
    MODES[mode](stream, 1)
    x[:] = -1
    assert ids(MODES[mode](stream, 2)) == list(range(4, 12))


@pytest.mark.internal
def test_numpy_data_are_shared_and_kept_alive():
    rows, width = 4096, 256
    x = np.zeros((rows, width), np.float32)
    alive = weakref.ref(x.base if x.base is not None else x)
    source = memory({"x": x})
    [held] = jax.tree.leaves(nnx.state(source, SourceData))
    assert held.nbytes < 2 * x.nbytes
    shared = abs(held.unsafe_buffer_pointer() - x.ctypes.data) < 64
    assert shared == (jax.default_backend() == "cpu")
    x[5, 7] = 3
    del x
    gc.collect()
    assert alive() is not None or not shared
    assert source.gather(jnp.uint32([5]))["x"][0, 7] == (3 if shared else 0)


@pytest.mark.internal
@pytest.mark.parametrize("copy", [False, True])
def test_to_hold_numpy_data_compiles_nothing(copy, caplog):
    with jax.log_compiles():
        source = memory({"x": np.zeros((3, 5, 7, 11 + copy), np.float32)}, copy=copy)
        pickle.loads(pickle.dumps(source))
    assert not [r for r in caplog.records if "ompil" in r.getMessage()]


@pytest.mark.internal
def test_a_private_copy_is_the_only_one(monkeypatch):
    made = []
    monkeypatch.setattr(_column, "aligned", lambda *x: made.append(aligned(*x)) or made[-1])
    source = memory({"x": np.ones((4097, 63), np.float32)}, copy=True)
    [held] = jax.tree.leaves(nnx.state(source, SourceData))
    [own] = made
    shared = held.unsafe_buffer_pointer() == own.ctypes.data
    assert shared == (jax.default_backend() == "cpu")


@pytest.mark.spec("SRC-001", "SRC-002")
@pytest.mark.parametrize("names", [["a.b", "a"], ["x", "names", "length"], ["", "ä ö", "0", "_"]])
def test_any_string_is_the_name_of_a_field(names):
    data = {name: np.arange(4, dtype=np.int32) + i for i, name in enumerate(names)}
    data["deep"] = {"a": {"b": np.arange(4, dtype=np.int32)}, "a.b": np.arange(4, dtype=np.int32)}
    source = memory(data)
    assert_same(stored(source), data)
    records = [jax.tree.map(lambda x, i=i: x[i], data) for i in range(4)]
    assert_same(stored(memory(records)), data)
    for source in (
        RandomAccessSource(RandomAccessSourceConfig(), records),
        RandomAccessSource(RandomAccessSourceConfig(), jax.tree.map(np.int64, records)),
        IterableSource(IterableSourceConfig(), records),
    ):
        assert_same(Pipeline(source=source, batch_size=4).step(), data)


# Random access.


def chunks(source, sizes, key):
    starts = [0, *itertools.accumulate(sizes[:-1])]
    return [source.get_batch_at(*chunk, key) for chunk in zip(starts, sizes, strict=True)]


@pytest.mark.spec("SRC-015", "SRC-016")
@pytest.mark.parametrize("shuffle", [False, True, "permutation"])
def test_consecutive_chunks_of_one_key_hold_every_record_once(shuffle):
    source = memory(np.arange(10), shuffle=shuffle)
    key = jax.random.key(5)
    with jax.disable_jit():  # each size has another shape: without jit, none is compiled
        whole = source.get_batch_at(0, 30, key)["data"].tolist()
        for sizes in ([4, 4, 2, 20], [13, 17]):
            parts = [batch["data"] for batch in chunks(source, sizes, key)]
            assert np.concatenate(parts).tolist() == whole
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert (whole[:10] == whole[10:20]) == (shuffle is False)


@pytest.mark.spec("SRC-015", "SHUF-013", "KEYS-005")
def test_random_access_is_the_stream_with_that_order_key():
    stream = pipeline(length=10, batch_size=7, seed=3)
    key = _keys.node_key(np.uint32([0, 3]), "source")
    batches = [stream.source.get_batch_at(7 * i, 7, key) for i in range(4)]
    assert_same(batches, by_step(stream, 4))
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    assert_same(stream.source.get_batch_at(21, 7, typed), batches[3])


@pytest.mark.spec("SRC-015")
@pytest.mark.parametrize("shuffle", [True, "permutation"])
def test_equal_keys_give_equal_rows_and_others_do_not(shuffle):
    source, twin = (memory(np.arange(40), shuffle=shuffle) for _ in range(2))
    first = source.get_batch_at(3, 37, jax.random.key(1))
    assert_same(source.get_batch_at(3, 37, jax.random.key(1)), first)
    assert_same(twin.get_batch_at(3, 37, jax.random.key_data(jax.random.key(1))), first)
    other = source.get_batch_at(3, 37, jax.random.key(2))
    assert other["data"].tolist() != first["data"].tolist()


@pytest.mark.spec("SRC-015", "SHUF-017")
@pytest.mark.parametrize("shuffle", [False, True, "permutation"])
def test_random_access_is_traceable(shuffle):
    source = memory(np.arange(10), shuffle=shuffle)

    @jax.jit
    def at(start, seed):
        return source.get_batch_at(start, 6, jax.random.key(seed))

    for start in (0, 7, 23):
        expected = source.get_batch_at(start, 6, jax.random.key(4))
        assert_same(at(jnp.uint32(start), 4), expected)
    mapped = jax.vmap(lambda s: source.get_batch_at(s, 6, jax.random.key(4)))(jnp.arange(3))
    assert_same(jax.tree.map(lambda x: x[2], mapped), source.get_batch_at(2, 6, jax.random.key(4)))


@pytest.mark.spec("SRC-015", "KEYS-010")
def test_random_access_without_a_key_takes_the_source_s_own():
    own = MemorySource(MemorySourceConfig(shuffle=True), np.arange(10), rngs=nnx.Rngs(3, shuffle=8))
    stream = pipeline(source=own, batch_size=7)
    assert own.get_batch_at(0, 7)["data"].tolist() == stream.step()["data"].tolist()
    assert memory(np.arange(10)).get_batch_at(8, 4)["data"].tolist() == [8, 9, 0, 1]


@pytest.mark.spec("SRC-015")
@pytest.mark.parametrize("start", [10**12 + 3, np.int64(10**12 + 3)])
def test_a_start_far_out_is_in_the_right_epoch(start):
    source = memory(np.arange(1000), shuffle=True)
    with jax.disable_jit():
        got = source.get_batch_at(start, 5, jax.random.key(0))["data"]
    expected = model.order(model.fold_in((0, 0), 10**9), 1000, range(3, 8))
    assert got.tolist() == expected.tolist()


@pytest.mark.spec("DAG-018", "SRC-003")
def test_a_source_knows_its_spec():
    source = memory({"x": np.zeros((3, 2), np.uint8), "d": {"y": np.zeros(3)}})
    spec = jax.ShapeDtypeStruct
    assert source.element_spec == {"x": spec((2,), np.uint8), "d": {"y": spec((), np.float32)}}
    assert len(source) == 3


@pytest.mark.internal
@pytest.mark.parametrize("shuffle", [None, 1, "yes", 0, np.True_])
def test_a_config_is_checked(unchecked, shuffle):
    with pytest.raises(ValueError) as error:
        MemorySourceConfig(shuffle=shuffle)
    assert str(error.value) == f'`shuffle` is False, True or "permutation", got {shuffle!r}.'


@pytest.mark.spec("SRC-001", "SRC-002", "SHUF-001")
@settings(max_examples=5)
@given(
    st.integers(1, 30),
    st.dictionaries(st.text(max_size=3), st.sampled_from(TYPES), min_size=1, max_size=4),
    st.sampled_from([False, True, "permutation"]),
)
def test_rows_stay_together(length, types, shuffle):
    data = {name: np.arange(length).astype(dtype) for name, dtype in types.items()}
    data["deep"] = {"id": np.arange(length, dtype=np.int32)}
    with jax.disable_jit():
        source = memory(data, shuffle=shuffle)
        got = rows(by_step(pipeline(source=source, batch_size=length, rngs=nnx.Rngs(0)), 1))
    assert sorted(got["deep"]["id"].tolist()) == list(range(length))
    assert_same(got, jax.tree.map(lambda x: x[got["deep"]["id"]], data))


SPLIT = """
import itertools
import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from datarax import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig

table = np.arange(72, dtype=np.float32).reshape(18, 4)

def batches(data, mode, shuffle, last_batch):
    source = MemorySource(MemorySourceConfig(shuffle=shuffle), {"x": data})
    pipeline = Pipeline(source=source, batch_size=4, rngs=nnx.Rngs(0), last_batch=last_batch)
    if mode == "for":
        found = [batch["x"] for batch in pipeline]
    elif mode == "step":
        found = [pipeline.step()["x"] for _ in range(6)]
    else:
        found = list(pipeline.scan(lambda batch: batch["x"], 6))
    assert all(x.is_fully_replicated for x in found) or data is table
    return [np.asarray(x).tolist() for x in found]

for axis in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(axis,))
    data = jax.device_put(table, NamedSharding(mesh, P("devices")))
    for how in itertools.product(("for", "step", "scan"), (False, True), ("keep", "pad")):
        assert batches(data, *how) == batches(table, *how), (axis, how)
print("all equal")
"""


@pytest.mark.spec("SRC-001")
def test_data_that_a_mesh_splits_by_records_gives_the_same_batches():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run([sys.executable, "-c", SPLIT], capture_output=True, text=True, env=env)
    assert (run.stdout, run.returncode) == ("all equal\n", 0), run.stderr
