"""Sources that a user writes: what the pipeline asks of them, and how `get_batch_at` works."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datarax_conformance import model
from flax import nnx
from helpers import (
    MODES,
    Endless,
    Numbers,
    ReadOnly,
    assert_same,
    by_for,
    by_scan,
    by_step,
    double,
    ids,
    jitter,
    pipeline,
    record_words,
    rows,
)

from datarax import Pipeline, errors
from datarax._order import StoredOrder
from datarax.errors import RngsError, StateError
from datarax.sources import (
    EagerSourceBase,
    MemorySource,
    MemorySourceConfig,
    Order,
    RandomAccessSource,
    RandomAccessSourceConfig,
)


def epoch_words(seed, epoch):
    """The key of an epoch's order according to the model."""
    return [int(word) for word in model.epoch_key(model.base_key(seed), epoch)]


# With `gather`.


class Squares(EagerSourceBase):
    """Computes its records, and does not call the constructor of its base."""

    def __init__(self, length):
        self.length = length
        self.offset = nnx.Param(jnp.float32(0.5))

    def __len__(self):
        return self.length

    def gather(self, records):
        return {"id": records, "x": records.astype(jnp.float32) ** 2 + self.offset[...]}


@pytest.mark.internal
@pytest.mark.parametrize("shuffle", [None, 1, "yes", 0, np.True_, ["blocks"]])
def test_an_order_is_one_of_those_that_there_are(unchecked, shuffle):
    with pytest.raises(ValueError) as error:
        Numbers(10, shuffle=shuffle)
    orders = "[False, True, 'permutation', 'blocks']"
    assert str(error.value) == f"`shuffle` must be one of {orders}, got {shuffle!r}."


@pytest.mark.spec("SRC-012", "STEP-003", "ITER-002", "SCAN-001")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_source_is_asked_for_exactly_the_records_of_a_batch(last_batch):
    expected = pipeline(length=10, seed=3, last_batch=last_batch)
    source = Numbers(10, shuffle=True)
    for mode in MODES.values():
        stream = pipeline(source=source, rngs=nnx.Rngs(3), last_batch=last_batch)
        expected.reset()
        assert [b["id"].tolist() for b in mode(stream, 5)] == [
            b["id"].tolist() for b in mode(expected, 5)
        ]
        assert stream.cursor == expected.cursor


@pytest.mark.spec("SRC-012", "STEP-017")
def test_a_source_needs_two_methods_and_may_have_parameters():
    source = Squares(5)
    stream = pipeline(source=source, batch_size=5)
    for mode in MODES.values():
        assert mode(stream, 1)[0]["x"].tolist() == [0.5, 1.5, 4.5, 9.5, 16.5]
    source.offset[...] = jnp.float32(1)
    assert stream.step()["x"].tolist() == [1, 2, 5, 10, 17]
    grads = nnx.grad(lambda s: s.step()["x"].sum(), argnums=nnx.DiffState(0, nnx.Param))(stream)
    assert [g.tolist() for g in jax.tree.leaves(grads)] == [5]
    assert source.get_batch_at(3, 4)["id"].tolist() == [3, 4, 0, 1]


@pytest.mark.spec("SRC-012", "KEYS-010")
def test_a_source_of_its_own_seed_keeps_its_order():
    own = Numbers(10, shuffle=True, rngs=nnx.Rngs(5))
    assert ids(pipeline(source=own, rngs=nnx.Rngs(1))) == ids(pipeline(length=10, seed=5))


# With `get_batch_at` alone.


@pytest.mark.spec("SRC-013", "KEYS-005")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_a_sized_source_is_read_at_offsets_with_the_key_of_the_epoch(mode, last_batch):
    stream = pipeline(source=ReadOnly(6), rngs=nnx.Rngs(8), last_batch=last_batch)
    batches = MODES[mode](stream, 4)
    if last_batch == "drop":
        assert [b["offset"].tolist() for b in batches] == [[0, 1, 2, 3]] * 4
        assert [b["key"].tolist() for b in batches] == [[epoch_words(8, e)] * 4 for e in range(4)]
    else:
        assert [b["offset"].tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 0, 0]] * 2
        assert [b["mask"].sum() for b in batches] == [4, 2, 4, 2]
        keys = [b["key"][b["mask"]].tolist() for b in batches]
        assert keys == [[epoch_words(8, e)] * n for e in (0, 1) for n in (4, 2)]


@pytest.mark.spec("SRC-013", "STEP-003", "STEP-004", "SCAN-004")
@pytest.mark.parametrize("batch_size", [4, 6, 15])
def test_a_batch_across_epochs_is_read_from_each(batch_size):
    def stream():
        return pipeline(source=ReadOnly(6), rngs=nnx.Rngs(8), batch_size=batch_size)

    batches = by_step(stream(), 5)
    assert_same(by_scan(stream(), 5), batches)
    got = rows(batches)
    places = [divmod(p, 6) for p in range(5 * batch_size)]
    assert got["offset"].tolist() == [offset for _, offset in places]
    assert got["key"].tolist() == [epoch_words(8, epoch) for epoch, _ in places]
    looped = rows(by_for(stream(), -(-6 // batch_size)))
    assert_same(looped, jax.tree.map(lambda x: x[:6], got))


@pytest.mark.spec("SRC-013")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
@pytest.mark.parametrize("mode", MODES)
def test_fields_may_be_of_numpy(mode, last_batch):
    class Constant(ReadOnly):
        def get_batch_at(self, start, batch_size, key):
            batch = super().get_batch_at(start, batch_size, key)
            return {**batch, "a": {"n": np.arange(batch_size, dtype=np.int32) + 1}}

    def stream(source):
        return pipeline(source=source, rngs=nnx.Rngs(8), batch_size=4, last_batch=last_batch)

    found, expected = MODES[mode](stream(Constant(6)), 4), MODES[mode](stream(ReadOnly(6)), 4)
    for batch, plain in zip(found, expected, strict=True):
        numbers = batch.pop("a")["n"]
        assert_same(batch, plain)
        assert isinstance(numbers, jax.Array)
        offsets = np.asarray(plain["offset"]).astype(int)
        places = np.where(offsets < offsets[0], offsets, offsets - offsets[0])
        assert numbers.tolist() == ((places + 1) * np.asarray(plain.get("mask", 1))).tolist()


@pytest.mark.spec("SRC-013")
def test_without_rngs_there_is_no_key():
    asked = []

    class Source(ReadOnly):
        def get_batch_at(self, start, batch_size, key):
            asked.append((start.shape, start.dtype, batch_size, key))
            return super().get_batch_at(start, batch_size, key)

    list(pipeline(source=Source(6)))
    assert set(asked) == {((), np.dtype(np.uint32), n, None) for n in (4, 2)}


@pytest.mark.spec("SRC-014", "KEYS-005", "STEP-010")
@pytest.mark.parametrize("mode", MODES)
def test_an_endless_source_is_one_epoch_that_does_not_end(mode):
    stream = pipeline(source=Endless(), rngs=nnx.Rngs(8))
    batches = MODES[mode](stream, 3)
    assert ids(batches) == list(range(12))
    assert {tuple(words) for b in batches for words in b["key"].tolist()} == {
        tuple(epoch_words(8, 0))
    }
    assert stream.cursor == (0, 12)
    stream.seek(epoch=0, offset=2**31)
    assert ids(MODES[mode](stream, 1)) == [2**31 + i for i in range(4)]


@pytest.mark.spec("SRC-014", "STEP-007")
@pytest.mark.parametrize("last_batch", ["drop", "pad"])
def test_the_policies_find_nothing_to_do_in_an_endless_source(last_batch):
    stream = pipeline(source=Endless(), last_batch=last_batch)
    for mode in MODES.values():
        for batch in mode(stream, 2):
            assert len(batch["id"]) == 4
            assert ("mask" in batch) == (last_batch == "pad")
            assert last_batch == "drop" or batch["mask"].all()


@pytest.mark.spec("KEYS-015", "KEYS-006")
@pytest.mark.parametrize("make", [lambda: ReadOnly(6), Endless], ids=["sized", "endless"])
def test_over_random_access_the_offset_takes_the_place_of_the_record(make):
    source = make()
    stream = pipeline([record_words], source=source, rngs=nnx.Rngs(8))
    got = rows(by_step(stream, 3))["keys"].tolist()
    node = model.node_key(model.base_key(8), "record_words")
    places = [divmod(p, 6) if isinstance(source, ReadOnly) else (0, p) for p in range(12)]
    expected = [model.fold_in(model.fold_in(node, epoch), offset) for epoch, offset in places]
    assert got == [[int(a), int(b)] for a, b in expected]


@pytest.mark.spec("STEP-009", "KEYS-008", "SRC-013")
def test_the_stream_of_random_access_does_not_depend_on_the_batch_size():
    class Data(ReadOnly):
        def get_batch_at(self, start, batch_size, key):
            batch = super().get_batch_at(start, batch_size, key)
            return {**batch, "x": batch["offset"].astype(jnp.float32)}

    def records(batch_size, count):
        stream = pipeline([jitter()], source=Data(10), rngs=nnx.Rngs(1), batch_size=batch_size)
        return rows(by_step(stream, count))

    assert_same(records(7, 4), records(4, 7))


@pytest.mark.spec("SRC-013", "SRC-014", "STATE-001")
@pytest.mark.parametrize("make", [lambda: ReadOnly(6), Endless], ids=["sized", "endless"])
def test_streams_over_user_sources_resume(make):
    stream = pipeline([double_offset], source=make(), rngs=nnx.Rngs(8))
    for _ in range(4):
        other = pipeline([double_offset], source=make(), rngs=nnx.Rngs(8))
        other.set_state(stream.get_state())
        assert_same(other.step(), stream.step())


def double_offset(batch):
    return {**batch, "more": batch["key"] * 2}


@pytest.mark.spec("SRC-012", "ERR-013", "ERR-002")
def test_a_source_of_no_records_is_refused():
    with pytest.raises(errors.EmptySourceError) as error:
        Pipeline(source=Numbers(0), batch_size=1)
    assert str(error.value) == "A source must hold at least one record, but `source` holds none."


@pytest.mark.spec("SRC-001", "ERR-025", "ERR-002")
@pytest.mark.parametrize(
    "batch, text",
    [
        ({"x": jnp.zeros(3)}, "a source must give the 4 rows it is asked for, got 3"),
        ({"x": jnp.zeros(4), "y": jnp.zeros(3)}, "must have the same number of rows"),
        (jnp.zeros(4), "must return a dict of arrays, got"),
        (None, "must return a dict of arrays, got NoneType"),
        ([1], "must return a dict of arrays, got list"),
        ({"x": jnp.zeros(4), "y": 1.5}, "axis 0, got 'y' as"),
        ({"a": {"x": np.float32(1)}}, "got 'a.x' as a scalar float32"),
        ({"x": np.zeros(5)}, "a source must give the 4 rows it is asked for, got 5"),
    ],
)
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_source_that_gives_no_batch_is_refused(unchecked, batch, text, last_batch):
    class Odd(EagerSourceBase):
        def __len__(self):
            return 10

        def gather(self, records):
            return batch

    class OddAccess(nnx.Module):
        def get_batch_at(self, start, batch_size, key):
            return batch

    class OddSized(OddAccess):
        def __len__(self):
            return 10

    for source in (Odd(), OddAccess(), OddSized()):
        with pytest.raises(errors.StageError) as error:
            Pipeline(source=source, stages=[double], batch_size=4, last_batch=last_batch)
        assert error.value.node == "source" and text in str(error.value)


@pytest.mark.spec("SRC-015", "ERR-029")
@pytest.mark.parametrize("start", [-1, 1.5, "0", None, 10 * 2**32, jnp.float32(3)], ids=str)
def test_a_start_before_the_stream_is_refused(unchecked, start):
    with pytest.raises(errors.SeekError) as error:
        Numbers(10).get_batch_at(start, 3)
    assert str(error.value) == (
        f"`start` must be an integer of at least 0, within 2**32 epochs, got {start!r}."
    )
    last = Numbers(10).get_batch_at(10 * 2**32 - 2, 2)
    assert jax.tree.leaves(last)[0].tolist() == [8, 9]


@pytest.mark.spec("SRC-015")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_start_counts_every_bit_of_the_array_that_it_is(compiled):
    source = Numbers(10)
    with jax.enable_x64(True):
        read = jax.jit(source.get_batch_at, static_argnums=1) if compiled else source.get_batch_at
        for start in (2**32 + 5, 7 * 2**32 + 13):
            found = read(jnp.asarray(start, jnp.int64), 3)
            assert_same(found, source.get_batch_at(start, 3))
        assert_same(read(np.int64(2**32 + 5), 3), source.get_batch_at(2**32 + 5, 3))
    assert_same(read(jnp.int8(5), 3), source.get_batch_at(5, 3))
    with pytest.raises(errors.SeekError, match=r"at least 0, within 2\*\*32 epochs, got Array\(-1"):
        source.get_batch_at(jnp.int32(-1), 3)


@pytest.mark.spec("SRC-015", "ERR-029")
@pytest.mark.parametrize(
    "key, got",
    [
        (42, "int"),
        (jnp.zeros(2, jnp.int32), "int32[2]"),
        (np.zeros(1, np.uint32), "uint32[1]"),
        (jnp.uint32(3), "uint32[]"),
    ],
    ids=["number", "signed", "one word", "no axis"],
)
def test_what_is_no_key_is_refused(unchecked, key, got):
    with pytest.raises(errors.RngsError) as error:
        Numbers(10).get_batch_at(0, 3, key)
    assert str(error.value) == (
        f"A key must be that of `jax.random.key(seed)`, or its two words of type uint32, got {got}."
    )


@pytest.mark.spec("SRC-015", "ERR-012")
@pytest.mark.parametrize("size", [0, -1, 2**31, 2.5, "3", True], ids=repr)
def test_a_batch_of_no_size_is_refused(unchecked, size):
    with pytest.raises(errors.BatchSizeError):
        Numbers(10).get_batch_at(0, size)
    assert len(jax.tree.leaves(Numbers(10).get_batch_at(0, jnp.int32(3)))[0]) == 3


class Reversed(EagerSourceBase):
    """Records in an order of its own."""

    def __len__(self):
        return 10

    def gather(self, records):
        return {"id": 9 - records}

    def order(self, order_key, epochs):
        return StoredOrder(None, 10)


class Backwards(Order):
    """From the last record to the first, written with the public interface only."""

    length: int = eqx.field(static=True)

    def __call__(self, offsets, turn=None):
        return offsets.dtype.type(self.length - 1) - offsets


class Turned(Numbers):
    def order(self, order_key, epochs):
        return Backwards(len(self))


@pytest.mark.spec("SHUF-001", "SRC-012")
@pytest.mark.parametrize("mode", MODES)
def test_an_order_of_ones_own_is_written_with_public_names(mode):
    stream = Pipeline(source=Turned(10), batch_size=4)
    batches = MODES[mode](stream, 2)
    assert [x.tolist() for batch in batches for x in jax.tree.leaves(batch)] == [
        [9, 8, 7, 6],
        [5, 4, 3, 2],
    ]


class Shifted(Order):
    shift: jax.Array
    length: int = eqx.field(static=True)

    def __call__(self, offsets, turn=None):
        return (offsets + self.shift) % offsets.dtype.type(self.length)


class OnHost(RandomAccessSource):
    """Its order is computed from a Variable, which may change."""

    def __init__(self, n):
        super().__init__(RandomAccessSourceConfig(), [{"id": np.int32(i)} for i in range(n)])
        self.shift = nnx.Variable(jnp.uint32(0))

    def order(self, order_key, epochs):
        return Shifted(self.shift.get_value(), len(self))


@pytest.mark.spec("SHUF-001", "SRC-030")
@pytest.mark.parametrize("take", [by_step, by_for])
def test_an_order_of_ones_own_may_change_between_batches(take):
    stream = Pipeline(source=OnHost(10), batch_size=2)
    assert ids(take(stream, 2)) == [0, 1, 2, 3]
    stream.source.shift.set_value(jnp.uint32(5))
    assert ids(take(stream, 2)) == [9, 0, 1, 2]


@pytest.mark.spec("ERR-001")
def test_what_is_no_order_is_told_so(unchecked):
    class Plain(Numbers):
        def order(self, order_key, epochs):
            return lambda offsets, turn=None: offsets

    words = "`order` of Plain must return a datarax.sources.Order, got function."
    with pytest.raises(TypeError, match=words):
        Plain(10).get_batch_at(0, 3)
    with pytest.raises(TypeError, match=words):
        Pipeline(source=Plain(10), batch_size=3)


@pytest.mark.spec("STATE-010", "STATE-016")
def test_a_state_knows_an_order_of_ones_own():
    own = Pipeline(source=Reversed(), batch_size=3)
    assert own.get_state()["fingerprint"]["order"] == "Reversed stored"
    memory = MemorySource(MemorySourceConfig(), {"id": np.arange(10, dtype=np.uint32)})
    other = Pipeline(source=memory, batch_size=3)
    for one, two in ((own, other), (other, own)):
        with pytest.raises(StateError, match="'order' is"):
            one.set_state(two.get_state())


class Holding(Numbers):
    def __init__(self, name, value):
        super().__init__(10)
        setattr(self, name, value)


@pytest.mark.spec("ERR-023")
@pytest.mark.parametrize(
    "name, value",
    [
        ("base", MemorySource(MemorySourceConfig(), np.arange(3))),
        ("reader", np.arange(3)),
        ("masks", np.arange(3)),
        ("order", 5),
        ("records", [1, 2]),
        ("shuffle", 3),
    ],
)
def test_an_attribute_that_means_something_is_not_taken_for_another(name, value, unchecked):
    with pytest.raises(TypeError, match=f"`{name}` means something to every source and cannot"):
        Holding(name, value)
    assert Holding("inner", value).inner is value
    assert Holding("masks", np.bool_(True)).masks


class Uniform(nnx.Module):
    def get_batch_at(self, start, batch_size, key):
        return {"x": jax.random.uniform(key, (batch_size,))}


class Misspelt(nnx.Module):
    def get_batch_at(self, start, batch_size, key):
        return {"x": self.tabel[start]}


@pytest.mark.spec("ERR-030")
def test_a_source_that_draws_needs_a_seed():
    with pytest.raises(RngsError, match="If it draws from its key, give the pipeline rngs"):
        Pipeline(source=Uniform(), batch_size=4)
    assert Pipeline(source=Uniform(), batch_size=4, rngs=nnx.Rngs(0)).step()["x"].shape == (4,)
    with pytest.raises(AttributeError, match="tabel"):  # a seed would not help
        Pipeline(source=Misspelt(), batch_size=4)
