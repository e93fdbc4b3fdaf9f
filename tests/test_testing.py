"""`datarax.testing`: good parts pass, and for each law there is a part that breaks it."""

import dataclasses
import functools
import itertools
import os
import pickle
import re
import tempfile
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    Affine,
    Count,
    Endless,
    EqxScale,
    Numbers,
    ReadOnly,
    add,
    columns,
    double,
    jitter,
)

from datarax import Pipeline
from datarax._order import Order
from datarax.errors import BatchSizeError, EmptySourceError, ReadError, SourceError
from datarax.sources import (
    EagerSourceBase,
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
    StreamSource,
    StreamSourceConfig,
)
from datarax.testing import LawError, check_pipeline, check_source, check_stage

N = 11


def memory(n: int = N) -> MemorySource:
    return MemorySource(MemorySourceConfig(shuffle=True), columns(n))


def records():
    for i in range(N):
        yield {"id": np.int32(i)}


class Unreadable(list):
    def __getitem__(self, i):
        if i == 5:
            raise OSError
        return super().__getitem__(i)


class Ordered(Numbers):
    def order(self, order_key, epochs):
        return super().order(order_key, epochs)


MASKING = RandomAccessSourceConfig(shuffle=True, on_error="mask", max_errors=1)

SOURCES = {
    "memory": memory,
    "huge": lambda: Numbers(2**32 - 2, shuffle=True),
    "one record": lambda: Numbers(1, shuffle="permutation"),
    "an order of its own": lambda: Ordered(N, shuffle=True),
    "by key": lambda: ReadOnly(N),
    "endless": Endless,
    "on the host": lambda: RandomAccessSource(MASKING, Unreadable(records())),
    "stream": lambda: IterableSource(IterableSourceConfig(), records),
}


@pytest.mark.spec("SRC-011", "SRC-012", "SRC-013", "ITER-011", "SCAN-001", "STATE-001")
@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_of_the_library_keep_the_laws(name):
    check_source(SOURCES[name]())


class Fractions(EagerSourceBase):
    """XLA rounds the quotient of one row otherwise than those of several."""

    def __len__(self):
        return 40

    def gather(self, records):
        return {"x": records.astype(jnp.float32) / 40}


@pytest.mark.internal("what the checks for parts of one's own find")
def test_rounding_that_depends_on_the_number_of_rows_is_no_fault():
    check_source(Fractions())
    with pytest.raises(LawError, match="SRC-012 does not hold"):
        check_source(Fractions(), rtol=0.0)


BATCH = {"id": np.arange(6, dtype=np.int32), "x": np.arange(6, dtype=np.float32)}


def mix_rows(batch):
    return {"x": batch["x"] - batch["x"].mean()}


@pytest.mark.spec("STEP-009", "KEYS-008", "ITER-011", "SCAN-001", "STATE-015")
@pytest.mark.parametrize("stage", [double, Affine(2, 1), EqxScale(jnp.float32(3)), jitter()])
def test_stages_of_single_records_keep_the_laws(stage):
    check_stage(stage, BATCH)


@pytest.mark.internal("what the checks for parts of one's own find")
def test_stages_of_whole_batches_keep_them_where_they_are_said_to_be_such():
    for stage in mix_rows, Count():
        check_stage(stage, BATCH, per_record=False)
        with pytest.raises(LawError, match=r"STEP-009.*pass `per_record=False` if the stage is to"):
            check_stage(stage, BATCH)


@pytest.mark.internal("what the checks for parts of one's own find")
def test_a_stage_of_several_predecessors_is_given_a_batch_for_each():
    check_stage(add, BATCH, BATCH)
    with pytest.raises(ValueError, match="`check_stage` needs a batch to call the stage with"):
        check_stage(add)


@pytest.mark.internal("what the checks for parts of one's own find")
def test_the_stage_that_is_checked_stays_as_it_is():
    stage = Count()
    check_stage(stage, BATCH, per_record=False)
    assert stage.seen.get_raw_value() == 0


class Offset(nnx.Module):
    """It reads a Variable that holds a Python number."""

    def __init__(self):
        self.by = nnx.Variable(3.5)

    def __call__(self, batch):
        return {**batch, "x": batch["x"] + self.by[...]}


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("rows, batch_size", [(1, None), (7, 3)])
def test_any_number_of_rows_will_do(rows, batch_size, standard_promotion):
    batch = {
        "x": np.arange(rows, dtype=np.float32),
        "key": jax.random.split(jax.random.key(0), rows),
    }
    check_stage(Offset(), batch, batch_size=batch_size)


def sort(batch):
    return {"x": jnp.sort(batch["x"])}


def twice(batch):
    return {"x": jnp.repeat(batch["x"], 2)}


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("stage, scale", [(mix_rows, 1e-6), (sort, 1e6), (twice, 1)])
def test_numbers_of_any_size_are_told_apart(stage, scale):
    with pytest.raises(LawError, match=r"^STEP-009 does not hold: "):
        check_stage(stage, {"x": np.arange(6, dtype=np.float32) * np.float32(scale)})


# Sources that break a law each.


class Sorted(Numbers):
    def gather(self, records):
        return {"id": jnp.sort(records)}


class Small(Numbers):
    """Sorted, too, of small numbers."""

    def gather(self, records):
        return {"x": jnp.sort(records).astype(jnp.float32) * jnp.float32(1e-6)}


class Shifted(Numbers):
    def gather_range(self, start, size):
        return super().gather_range(start + start.dtype.type(1), size)


class Misnamed(Numbers):
    @property
    def element_spec(self):
        return {"id": jax.ShapeDtypeStruct((), np.dtype(np.int32))}


class Missing(Numbers):
    @property
    def element_spec(self):
        return {**super().element_spec, "label": jax.ShapeDtypeStruct((), np.dtype(np.int32))}


class Eager(Numbers):
    """Gives other rows when it is compiled."""

    def gather(self, records):
        traced = isinstance(records, jax.core.Tracer)
        return {"id": records + records.dtype.type(traced)}


class HalvedOrder(Order):
    whole: Order
    length: int = eqx.field(static=True)

    def __init__(self, whole):
        self.whole, self.length = whole, whole.length

    def __call__(self, offsets, turn=None):
        return self.whole(offsets, turn) // offsets.dtype.type(2)


class Halved(Numbers):
    """Its order has half of the records twice."""

    def order(self, order_key, epochs):
        return HalvedOrder(super().order(order_key, epochs))


class Clamped(nnx.Module):
    """Slices past the end; `dynamic_slice` clamps the start."""

    def __len__(self):
        return N

    def get_batch_at(self, start, batch_size, key):
        del key
        rows = jnp.arange(N, dtype=jnp.int32)
        return {"id": jax.lax.dynamic_slice(rows, (start,), (batch_size,))}


@dataclasses.dataclass(frozen=True)
class Good(Reader):
    seed: int = 0

    def __len__(self):
        return N

    @property
    def stored_spec(self):
        return {"id": jax.ShapeDtypeStruct((), np.dtype(np.int32))}

    def read(self, records):
        return {"id": records.astype(np.int32)}


class Stepping(nnx.Module):
    """Ends with its data, though it has no length."""

    def get_batch_at(self, start, batch_size, key):
        del key
        return {"x": jax.lax.dynamic_slice(jnp.arange(200), (start,), (batch_size,))}


class OneBuffer(Good):
    buffer = np.zeros(N, np.int32)

    def read(self, records):
        rows = self.buffer[: len(records)]
        rows[:] = records
        return {"id": rows}


class OnePosition(Good):
    """Seeks and then reads in one open file, without a lock."""

    @functools.cached_property
    def file(self):
        file, path = tempfile.mkstemp()
        os.unlink(path)
        os.write(file, np.arange(N, dtype=np.int32).tobytes())
        weakref.finalize(self, os.close, file)
        return file

    def read(self, records):
        found = []
        for record in records:
            os.lseek(self.file, 4 * int(record), os.SEEK_SET)
            found.append(int.from_bytes(os.read(self.file, 4), "little"))
        return {"id": np.array(found, np.int32)}


class Forgetful(Good):
    """A pickled copy of it reads other rows."""

    def read(self, records):
        return {"id": np.int32(records + self.seed)}

    def __reduce__(self):
        return Forgetful, (self.seed + 1,)


GENERATOR = np.random.default_rng(0)


def drawn_elsewhere():
    for _ in range(N):
        yield {"x": np.float32(GENERATOR.uniform())}


class Rewound(Stream):
    """Ignores `skip`."""

    def begin(self, epoch, skip):
        del epoch, skip
        return records()


class RewoundLater(Stream):
    """Only in the passes after the first."""

    def begin(self, epoch, skip):
        return itertools.islice(records(), skip if epoch == 0 else 0, None)


class Careless(Good):
    """Uses up numbers of the global generator."""

    def read(self, records):
        np.random.uniform()
        return super().read(records)


def on_host(reader: Reader) -> EagerSourceBase:
    return HostSource(reader, HostSourceConfig())


BROKEN = {
    "SRC-012": {
        "sorted": lambda: Sorted(N),
        "small": lambda: Small(N),
        "shifted": lambda: Shifted(N),
    },
    "SRC-003": {"misnamed": lambda: Misnamed(N), "missing": lambda: Missing(N)},
    "STEP-015": {"eager": lambda: Eager(N)},
    "SHUF-001": {"halved": lambda: Halved(N)},
    "SRC-013": {"clamped": Clamped, "stepping": Stepping},
    "SRC-009": {"one buffer": lambda: on_host(OneBuffer())},
    "SRC-019": {"one position": lambda: on_host(OnePosition())},
    "SRC-020": {"forgetful": lambda: on_host(Forgetful())},
    "SRC-011": {"drawn elsewhere": lambda: IterableSource(IterableSourceConfig(), drawn_elsewhere)},
    "SRC-010": {"careless": lambda: on_host(Careless())},
    "SRC-028": {
        "rewound": lambda: StreamSource(Rewound()),
        "in windows": lambda: StreamSource(Rewound(), StreamSourceConfig(shuffle=True)),
        "rewound later": lambda: StreamSource(RewoundLater()),
    },
}


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("law, name", [(law, name) for law in BROKEN for name in BROKEN[law]])
def test_a_source_that_breaks_a_law_is_told_which(law, name, unchecked):
    with pytest.raises(LawError) as caught:
        check_source(BROKEN[law][name]())
    assert caught.value.law == law
    assert str(caught.value).startswith(f"{law} does not hold: ")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.internal("what the checks for parts of one's own find")
def test_a_law_error_says_where_the_parts_differ():
    with pytest.raises(LawError) as caught:
        check_source(Sorted(N))
    assert str(caught.value) == (
        "SRC-012 does not hold: the records [10, 8, 6, 4, 2, 0, 0, 0, 10] read together and one "
        "by one differ: 'id'[0] is 10 and 0. `gather` gives a row for every record that it is "
        "asked for, in that order."
    )
    with pytest.raises(LawError) as caught:
        check_source(Misnamed(N))
    assert str(caught.value) == (
        "SRC-003 does not hold: a row of 'id' is int32[] by `element_spec`, but uint32[] where "
        "`gather` has read record 0."
    )
    with pytest.raises(LawError, match="rows that were kept have changed with the next `read`: "):
        check_source(on_host(OneBuffer()))


@pytest.mark.spec("ERR-012")
def test_what_is_no_source_is_refused_as_a_pipeline_refuses_it(unchecked):
    with pytest.raises(EmptySourceError):
        check_source(Numbers(0))
    with pytest.raises(SourceError, match="is counted in 64 bits"):
        check_source(Numbers(2**33))
    with pytest.raises(TypeError, match=re.escape("check HostSource(reader, HostSourceConfig())")):
        check_source(Good())
    with pytest.raises(TypeError, match=re.escape("check StreamSource(stream).")):
        check_source(Rewound())
    with pytest.raises(TypeError, match="`make` must be a function that builds a new pipeline"):
        check_pipeline(pipeline_of(Pipeline))

    for batch_size in (0, -1, True, 2.5):
        with pytest.raises(BatchSizeError):
            check_source(on_host(Good()), batch_size=batch_size)
        with pytest.raises(BatchSizeError):
            check_stage(double, columns(4), batch_size=batch_size)

    class Broken(Good):
        def read(self, records):
            raise OSError("no such disk")

    with pytest.raises(ReadError, match="no such disk"):
        check_source(on_host(Broken()))


@pytest.mark.internal("what the checks for parts of one's own find")
def test_fields_of_any_type_and_name_are_compared():
    data = {
        "mask": np.arange(N) % 2 == 0,
        "mask_": np.arange(N, dtype=np.uint8),
        "half": jnp.arange(N, dtype=jnp.bfloat16),
        "pair": np.arange(N, dtype=np.complex64) * 1j,
        "key": jax.random.split(jax.random.key(0), N),
        "deep": {"x": np.full((N, 0), np.nan, np.float32)},
    }
    check_source(MemorySource(MemorySourceConfig(shuffle=True), data))


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("bad", [0, N - 1])
def test_records_that_are_masked_may_be_any(bad):
    class Items(list):
        def __getitem__(self, i):
            if i == bad:
                raise OSError
            return super().__getitem__(i)

    check_source(RandomAccessSource(MASKING, Items(records())))


@pytest.mark.internal("what the checks for parts of one's own find")
def test_a_stream_whose_pass_ends_early_is_no_fault():
    def make():
        return Pipeline(source=IterableSource(IterableSourceConfig(), records), batch_size=4)

    check_pipeline(make)


# Pipelines that break a law each.


class Backwards(Pipeline):
    def __iter__(self):
        return iter([*super().__iter__()][::-1])


class Longer(Pipeline):
    def scan(self, *args, **options):
        return jax.tree.map(lambda x: x[::-1], super().scan(*args, **options))


class Reused(Pipeline):
    """Returns the same buffer at every read."""

    def step(self):
        found = jax.tree.map(np.asarray, super().step())
        kept = self.__dict__.setdefault("_kept", jax.tree.map(np.array, found))
        jax.tree.map(lambda to, x: to.__setitem__(..., x), kept, found)
        return dict(kept)


class Amnesiac(Pipeline):
    def set_state(self, state):
        pass


class Restless(Pipeline):
    def get_state(self):
        state = super().get_state()
        self.step()
        return state


class Reborn(Pipeline):
    def __deepcopy__(self, memo):
        copied = pipeline_of(Pipeline)
        copied.reset()
        return copied


def pipeline_of(kind: type[Pipeline]) -> Pipeline:
    return kind(source=memory(), batch_size=3, rngs=nnx.Rngs(0))


PIPELINES = {
    "ITER-011": Backwards,
    "SCAN-001": Longer,
    "SRC-009": Reused,
    "STATE-001": Amnesiac,
    "STATE-005": Restless,
    "STATE-022": Reborn,
}


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("law", PIPELINES)
def test_a_pipeline_that_breaks_a_law_is_told_which(law):
    with pytest.raises(LawError, match=rf"^{law} does not hold: "):
        check_pipeline(lambda: pipeline_of(PIPELINES[law]))


@pytest.mark.internal("what the checks for parts of one's own find")
def test_pipelines_that_are_not_built_alike_are_no_one_program():
    one = pipeline_of(Pipeline)
    with pytest.raises(LawError, match=r"^SRC-011 .*built alike.* Build all of it anew"):
        check_pipeline(lambda: one)


@pytest.mark.internal("what the checks for parts of one's own find")
def test_a_pipeline_of_global_randomness_is_told_so(unchecked):
    def make():
        data = {"x": np.random.uniform(size=N).astype(np.float32)}
        return Pipeline(source=MemorySource(MemorySourceConfig(), data), batch_size=3)

    with pytest.raises(LawError, match=r"^SRC-010 does not hold: under two global seeds of `rando"):
        check_pipeline(make)


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize("last_batch", ["keep", "drop", "pad"])
def test_a_pipeline_is_checked_at_the_end_of_its_epoch(last_batch):
    asked = set()

    class Asked(Numbers):
        def gather(self, records):
            jax.debug.callback(lambda x: asked.update(x.tolist()), records)
            return super().gather(records)

    def make():
        return Pipeline(source=Asked(1000), batch_size=3, last_batch=last_batch)

    check_pipeline(make)
    jax.effects_barrier()
    end = 998 if last_batch == "drop" else 999
    assert {0, 1, 2, end} <= asked and len(asked) < 50


class OneRecord(Stream):
    """Yields all its records in one reused array."""

    def begin(self, epoch, skip):
        record = np.zeros(2, np.int32)
        for i in range(skip, N):
            record[:] = i
            yield {"x": record}


class Picked(EagerSourceBase):
    """Some records, by an array of NumPy that it holds as it is."""

    def __init__(self):
        super().__init__(shuffle=True)
        self.picked = np.arange(0, 2 * N, 2, dtype=np.int32)

    def __len__(self):
        return N

    def gather(self, records):
        return {"id": self.picked[records]}


@pytest.mark.internal("what the checks for parts of one's own find")
@pytest.mark.parametrize(
    "source",
    [
        StreamSource(OneRecord()),
        Picked(),
        RandomAccessSource(MASKING, [{"mask": np.int32(i)} for i in range(N)]),
    ],
    ids=["one memory", "array of its own", "field of that name"],
)
def test_what_pipelines_take_is_no_fault(source):
    check_source(source)
