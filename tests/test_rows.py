"""From a cursor to the rows of a batch, held against plain integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings, strategies as st

from datarax import _rows
from datarax._order import StoredOrder, word
from datarax._types import Cursor
from datarax.errors import SeekError

LENGTHS = st.one_of(st.integers(1, 40), st.integers(2**32 - 40, 2**32 - 1), st.just(2**31))
SIZES = st.sampled_from([1, 2, 3, 7, 8, 60])  # each is a shape for JAX to compile
POLICIES = st.sampled_from(["keep", "drop", "pad"])
EPOCHS = st.integers(0, 2**32 - 100)


@st.composite
def places(draw):
    """A length, a batch size, a policy, and a cursor from which a batch can start."""
    length, size, policy = draw(LENGTHS), draw(SIZES), draw(POLICIES)
    assume(policy != "drop" or size <= length)
    last = length - size if policy == "drop" else length - 1
    offset = draw(st.one_of(st.integers(0, min(last, 50)), st.integers(max(0, last - 50), last)))
    return length, size, policy, Cursor(draw(EPOCHS), offset)


def on_device(cursor, length):
    return Cursor(*(jnp.asarray(np.array(x, word(length))) for x in cursor))


def expected_rows(length, size, policy, cursor):
    """(epoch, offset) of each row, or None for a row that does not exist; and the next cursor."""
    position = cursor.epoch * length + cursor.offset
    at = [divmod(position + i, length) for i in range(size)]
    if policy == "pad":
        at = [place if place[0] == cursor.epoch else None for place in at]
    after = divmod(position + size, length)
    cut_short = policy == "drop" and after[1] + size > length
    if cut_short or (policy == "pad" and after[0] > cursor.epoch):
        after = (after[0] if after[1] == 0 and policy == "drop" else cursor.epoch + 1, 0)
    return at, after


@pytest.mark.spec("STEP-001", "STEP-003", "STEP-004", "STEP-005", "STEP-006", "STEP-007")
@settings(max_examples=150)
@given(places())
@example((2**32 - 1, 60, "keep", Cursor(2**32 - 100, 2**32 - 2)))
@example((1, 60, "keep", Cursor(0, 0)))
@example((2**31, 1, "drop", Cursor(0, 2**31 - 1)))
def test_rows_are_located_as_positions_are_counted(place):
    length, size, policy, cursor = place
    cut = _rows.running_on(size, length, policy)
    with jax.disable_jit():
        at = jax.tree.map(lambda x: x[None], on_device(cursor, length))
        rows = _rows.rows_at(StoredOrder(None, length), at, cut)
    expected, _ = expected_rows(*place)
    exists = [place is not None for place in expected]
    if policy == "pad":
        assert rows.mask.tolist() == exists
    else:
        assert rows.mask is None and all(exists)
    got = zip(rows.epoch.tolist(), rows.offset.tolist(), rows.record.tolist(), strict=True)
    for (epoch, offset, record), wanted in zip(got, expected, strict=True):
        assert 0 <= record == offset < length  # also where there is no record
        assert wanted is None or (epoch, offset) == wanted
    assert rows.record.dtype == word(length)


@pytest.mark.spec("STEP-010", "STEP-011", "STEP-008")
@settings(max_examples=150)
@given(places())
@example((2**32 - 1, 60, "keep", Cursor(2**32 - 100, 2**32 - 2)))
@example((2**32 - 1, 60, "drop", Cursor(2**32 - 100, 2**32 - 61)))
@example((10, 5, "drop", Cursor(3, 5)))
def test_a_cursor_moves_as_positions_are_counted(place):
    length, size, policy, cursor = place
    _, after = expected_rows(*place)
    host = _rows.advance(cursor, size, length, policy)
    assert host == after
    with jax.disable_jit():
        device = _rows.advance(on_device(cursor, length), size, length, policy)
    assert tuple(map(int, device)) == after
    assert _rows.settle(host, size, length, policy) == host


@pytest.mark.spec("STEP-010", "SCAN-001")
@settings(max_examples=150)
@given(places(), st.sampled_from([1, 2, 5, 9]))
@example((2**32 - 1, 60, "keep", Cursor(2**32 - 100, 2**32 - 2)), 9)
@example((2**32 - 1, 60, "pad", Cursor(2**32 - 100, 2**32 - 2)), 9)
@example((2**32 - 1, 60, "drop", Cursor(2**32 - 100, 2**32 - 121)), 9)
def test_batches_in_a_row_start_where_one_after_the_other_would(place, count):
    length, size, policy, cursor = place
    assume(cursor.epoch + size * count < 2**32 or length > size * count)
    with jax.disable_jit():
        found = _rows.starts(on_device(cursor, length), size, count, length, policy)
    expected = [cursor]
    for _ in range(count - 1):
        expected.append(_rows.advance(expected[-1], size, length, policy))
    assert list(zip(found.epoch.tolist(), found.offset.tolist(), strict=True)) == expected
    for k, start in enumerate(expected):
        assert _rows.start_after(cursor, size, k, length, policy) == start
    # Beyond the last row of the last batch nothing is touched.
    last = _rows.advance(expected[-1], size, length, "keep")
    ends = last.epoch - (last.offset == 0) if policy == "keep" else expected[-1].epoch
    cut = _rows.running_on(size, length, policy)
    assert ends - cursor.epoch < _rows.touched(cut, count, length, policy)


@pytest.mark.internal
def test_without_an_end_batches_start_one_size_apart():
    found = _rows.starts(Cursor(jnp.uint32(0), jnp.uint32(7)), 3, 4, None, "keep")
    assert found.epoch.tolist() == [0] * 4 and found.offset.tolist() == [7, 10, 13, 16]
    assert _rows.touched(_rows.Cut(3, 1, False), 4, None, "keep") == 1


@pytest.mark.spec("STEP-011")
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 39), EPOCHS)
def test_a_cursor_settles_where_a_batch_can_start(length, size, offset, epoch):
    cursor = Cursor(epoch, offset % length)
    for policy in ("keep", "pad"):
        assert _rows.settle(cursor, size, length, policy) == cursor
    settled = _rows.settle(cursor, size, length, "drop")
    assert settled == (cursor if cursor.offset + size <= length else (epoch + 1, 0))
    with jax.disable_jit():
        device = _rows.settle(on_device(cursor, length), size, length, "drop")
    assert tuple(map(int, device)) == settled


@pytest.mark.internal
@given(SIZES, st.integers(1, 40))
def test_a_cut_counts_the_epochs_that_a_batch_can_touch(size, length):
    touched = {
        len({(offset + i) // length for i in range(size)}) for offset in range(length)
    }  # wherever it starts
    assert _rows.running_on(size, length, "keep") == (size, max(touched), False)
    assert _rows.running_on(size, length, "drop") == (size, 1, False)
    assert _rows.running_on(size, length, "pad") == (size, 1, True)
    assert _rows.running_on(size, None, "keep") == (size, 1, False)


@pytest.mark.spec("SRC-002")
def test_rows_are_taken_in_the_order_asked_for():
    data = {"a": jnp.arange(12).reshape(4, 3), "d": {"b": jnp.arange(4.0)}}
    batch = _rows.take(data, jnp.uint32([3, 0, 0]))
    assert batch["a"].tolist() == [[9, 10, 11], [0, 1, 2], [0, 1, 2]]
    assert batch["d"]["b"].tolist() == [3, 0, 0]


@pytest.mark.spec("STEP-006")
def test_rows_that_do_not_exist_are_zero_in_every_field():
    batch = {
        "f": jnp.full((2, 3), jnp.nan),
        "d": {"b": jnp.array([True, True]), "i": jnp.int8([-1, -1])},
        "w": jnp.ones((2, 1, 1), jnp.bfloat16),
    }
    out = _rows.zero_outside(batch, jnp.array([True, False]))
    for before, after in zip(jax.tree.leaves(batch), jax.tree.leaves(out), strict=True):
        assert after.dtype == before.dtype and after.shape == before.shape
        np.testing.assert_array_equal(after[0], before[0])
        assert not np.asarray(after[1]).any()


@pytest.mark.spec("STEP-010")
def test_a_cursor_is_kept_in_the_word_of_its_source():
    assert _rows.pack(Cursor(3, 4), 10).dtype == np.uint32
    assert _rows.pack(Cursor(3, 4), None).dtype == np.uint32
    kept = _rows.pack(Cursor(2**32 - 1, 2**33), 2**40)
    assert kept.dtype == np.uint64 and kept.tolist() == [2**32 - 1, 2**33]
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 0


@pytest.mark.spec("STEP-010", "ERR-022")
def test_no_cursor_lies_past_the_last_epoch():
    with pytest.raises(SeekError) as error:
        _rows.pack(Cursor(2**32, 0), 10)
    assert str(error.value) == (
        "The stream ends before (4294967296, 0): no cursor counts further. "
        "Start again with `reset()`."
    )
