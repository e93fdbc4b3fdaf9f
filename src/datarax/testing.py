"""The laws of the spec, to be run on parts of your own: a source, a stage, a whole pipeline.

Each check builds small pipelines around the part, reads a few batches at the start and at the end
of an epoch, and raises a `LawError` that names the requirement which does not hold. A part that
passes may be shuffled, resumed, scanned and cut into batches like those of the library.
"""

import copy
import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._order import word
from ._types import Batch, expect, flat_fields
from .pipeline import Cursor, Pipeline
from .sources import (
    EagerSourceBase,
    MemorySource,
    MemorySourceConfig,
    Reader,
    SourceData,
    StreamSource,
)
from .sources._base import RandomAccess, length_of

BATCHES = 4
"""How many batches are read in a row."""

RECORDS = 2**16
"""The most records whose whole order is looked at."""

READ = 64
"""The most records of a source that are read one by one."""

THREADS, TURNS = 4, 4
"""How many threads read a source at once, and how often each does."""


class LawError(AssertionError):
    """A part does not keep the requirement `law` of the spec, `SRC-012` say."""

    def __init__(self, law: str, text: str):
        self.law = law
        super().__init__(f"{law} does not hold: {text}")


def check_pipeline(make: Callable[[], Pipeline], *, rtol: float = 1e-5) -> None:
    """Raises unless the modes agree, a state resumes, and nothing but the program decides batches.

    Batches around the first start and the first end of an epoch are read in every mode, so that it
    takes seconds whatever the size of the data. Most of that is compiling.

    Args:
        make: builds the pipeline, each time it is called a new one of new stages.
        rtol: how far floats may be apart, relative to the larger, or absolutely where that is less
            than 1. In different programs compilers may round the last bits differently; all else
            has to be equal.

    Raises:
        LawError: one of SRC-009 to SRC-011, ITER-011, SCAN-001, STATE-001, STATE-005
            and STATE-022.
    """
    first = make()
    expect("make()", first, Pipeline)
    for place in _places(first):
        _check_at(make, place, _cut_alike(first, place), rtol)


def check_source(
    source: Any, *, batch_size: int | None = None, seed: int = 0, rtol: float = 1e-5
) -> None:
    """Raises unless the source is one that pipelines can be built on.

    What is checked depends on how it is written. With `gather`: that rows come as they were asked
    for, whatever the order, compiled or not, and from `gather_range` too, and that an `order` of
    its own is a permutation. With a `Reader`: that several threads may read at once, and that what
    a pickle of it reads is the same, where it can be pickled. With `get_batch_at`: that row `i` is
    that of offset `start + i`, up to the very end of an epoch. For all: what `check_pipeline`
    checks, and that batches of another size hold the same records.

    Args:
        source: the source. Of a large one no more than a few hundred records are read.
        batch_size: of the pipelines that are built over it; by default a small one that does not
            divide the number of records.
        seed: of their shuffle.
        rtol: see `check_pipeline`.

    Raises:
        LawError: a requirement of the chapter "Source", SHUF-001, or one that `check_pipeline`
            names.
    """
    length = length_of(source)
    if isinstance(source, EagerSourceBase):
        _check_rows(source, rtol)
        _check_order(source, seed)
        if source.reader is not None:
            _check_reader(source.reader)
    elif isinstance(source, RandomAccess) and not isinstance(source, StreamSource):
        _check_random_access(source, length, seed, rtol)
    size = batch_size or _small(length)

    def make(size: int = size) -> Pipeline:
        return Pipeline(source=source, batch_size=size, last_batch="pad", rngs=nnx.Rngs(seed))

    check_pipeline(make, rtol=rtol)
    _check_cut(make, size, size + 1, rtol)


def check_stage(
    stage: Any,
    *batches: Batch,
    per_record: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    rtol: float = 1e-5,
) -> None:
    """Raises unless the stage does the same in every mode, after a resume, and for every cut.

    Args:
        stage: a function, an NNX module or an Equinox module; it is copied, and stays as it is.
        batches: what it is given, one batch for each of its predecessors, all of as many rows.
        per_record: whether what it makes of a record depends on that record alone. A stage that
            mixes the rows of a batch, or counts batches, is checked with False.
        batch_size: of the pipelines that are built around it; by default half of the rows.
        seed: for the stage's keys.
        rtol: see `check_pipeline`.

    Raises:
        LawError: STEP-009 where the cut into batches shows, or a law that `check_pipeline` names.
    """
    if not batches:
        raise ValueError("`check_stage` needs a batch to call the stage with, got none.")
    names = [f"input {i}" for i in range(len(batches))]
    source = MemorySource(MemorySourceConfig(), dict(zip(names, batches, strict=True)))
    rows, each = len(source), batch_size or max(1, len(source) // 2)

    def make(size: int = each) -> Pipeline:
        nodes = {name: _Part(name) for name in names} | {"stage": copy.deepcopy(stage)}
        return Pipeline.from_dag(
            source=source,
            nodes=nodes,
            edges={name: [] for name in names} | {"stage": names},
            sink="stage",
            batch_size=size,
            last_batch="drop",
            rngs=nnx.Rngs(seed),
        )

    check_pipeline(make, rtol=rtol)
    if per_record:
        for other in {1, rows} - {each}:
            _check_cut(make, each, other, rtol, "pass `per_record=False` if they are to")


class _Part:
    """A stage that gives what stands under one name in the batches of the source."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, batch: Batch) -> Batch:
        return batch[self.name]


# Pipelines.


class _Run(NamedTuple):
    """Batches as they were handed out, and what the pipeline remembers after them."""

    batches: list[Any]
    after: dict[str, Any]


def _places(pipeline: Pipeline) -> list[Cursor]:
    """Where to read: at the start, and so that the end of the first epoch is among the batches."""
    length, size = length_of(pipeline.source), pipeline.batch_size
    if length is None or length <= size * (BATCHES - 1):
        return [Cursor(0, 0)]
    near = (length // size - BATCHES + 2) * size
    return [Cursor(0, 0), Cursor(0, near)]


def _check_at(make: Callable[[], Pipeline], place: Cursor, alike: int, rtol: float) -> None:
    """The laws for the batches from one place on; so many of these `for` cuts as `step` does."""

    def at_place() -> Pipeline:
        pipeline = make()
        if place != (0, 0):
            pipeline.seek(epoch=place.epoch, offset=place.offset)
        return pipeline

    def at(run: Callable[[Pipeline, int], list[Any]], count: int = BATCHES) -> _Run:
        pipeline = at_place()
        return _Run(run(pipeline, count), _remembered(pipeline))

    where = f"from {tuple(place)} on"
    kept: list[Any] = []
    drawn = random.getstate(), np.random.get_state()
    stepped = at(lambda pipeline, count: _by_step(pipeline, count, kept))
    _compare("SRC-009", f"batches {where} that were kept have changed", stepped.batches, kept, rtol)
    try:
        for seed in None, 1:
            if seed is None:
                random.setstate(drawn[0])
                np.random.set_state(drawn[1])
                law, what = "SRC-011", "of two pipelines that `make` has built"
            else:
                random.seed(seed)
                np.random.seed(seed)
                law, what = "SRC-010", "under two global seeds of `random` and `np.random`"
            _same(law, f"{what}, batches {where}", stepped, at(_by_step), rtol)
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])

    if alike:
        one = stepped if alike == BATCHES else at(_by_step, alike)
        _same("ITER-011", f"of `step` and `for`, batches {where}", one, at(_by_for, alike), rtol)
    _same("SCAN-001", f"of `step` and `scan`, batches {where}", stepped, at(_by_scan), rtol)

    done = BATCHES // 2
    pipeline, resumed = at_place(), make()
    begun = _by_step(pipeline, done)
    resumed.set_state(json.loads(json.dumps(pipeline.get_state())))
    copied = copy.deepcopy(pipeline)
    for law, how, then in (
        ("STATE-005", "with and without a state and a copy being made", pipeline),
        ("STATE-001", "with and without a resume", resumed),
        ("STATE-022", "in a copy and in the original", copied),
    ):
        found = _Run(begun + _by_step(then, BATCHES - done), _remembered(then))
        _same(law, f"{how} after {done} of them, batches {where}", stepped, found, rtol)


def _cut_alike(pipeline: Pipeline, place: Cursor) -> int:
    """How many batches from there on `for` cuts as `step` does, of all that are read."""
    length, size = length_of(pipeline.source), pipeline.batch_size
    if length is None or pipeline.last_batch != "keep" or length % size == 0:
        return BATCHES
    return min(BATCHES, (length - place.offset) // size)


def _by_step(pipeline: Pipeline, count: int, kept: list[Any] | None = None) -> list[Any]:
    found = []
    for _ in range(count):
        batch = pipeline.step()
        found.append(_snapshot(batch))
        if kept is not None:
            kept.append(batch)
    return found


def _by_for(pipeline: Pipeline, count: int) -> list[Any]:
    loops = itertools.chain.from_iterable(iter(pipeline) for _ in itertools.count())
    return [_snapshot(batch) for batch in itertools.islice(loops, count)]


def _by_scan(pipeline: Pipeline, count: int) -> list[Any]:
    stacked = _snapshot(pipeline.scan(_whole, count))
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


def _whole(batch: Batch) -> Batch:
    return batch


def _snapshot(batch: Any) -> Any:
    """The values of a batch as they are now."""
    return jax.tree.map(lambda x: np.array(_plain(x)), batch)


def _plain(x: Any) -> Any:
    typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if typed else x


def _remembered(pipeline: Pipeline) -> dict[str, Any]:
    """The Variables of a pipeline by path, the cursor among them, but no data."""
    data, state = nnx.state(pipeline, SourceData, ...)
    del data
    cursor = {"cursor": np.array(pipeline.cursor)}
    return {
        ".".join(map(str, (*path, i))): np.array(_plain(leaf))
        for path, variable in nnx.to_flat_state(state)
        for i, leaf in enumerate(jax.tree.leaves(variable))
    } | cursor


def _same(law: str, what: str, expected: _Run, got: _Run, rtol: float) -> None:
    _compare(law, f"{what} differ", expected.batches, got.batches, rtol)
    _compare(
        law, f"{what} are equal, but what is remembered differs", expected.after, got.after, rtol
    )


def _check_cut(
    make: Callable[[int], Pipeline], one: int, other: int, rtol: float, way_out: str = ""
) -> None:
    """Two epochs in batches of another size have the same rows."""
    found = []
    for size in (one, other):
        pipeline = make(size)
        length = length_of(pipeline.source)
        rows = min(READ, one * other if length is None else length)
        loops = itertools.chain.from_iterable(iter(pipeline) for _ in range(2))
        batches = itertools.islice(loops, -(-rows // size) + 1)
        found.append(_rows(map(_snapshot, batches), pipeline))
    shared = min(len(jax.tree.leaves(rows)[0]) for rows in found)
    first, second = (jax.tree.map(lambda x: x[:shared], rows) for rows in found)
    _compare(
        "STEP-009",
        f"records in batches of {one} and in batches of {other} differ",
        first,
        second,
        rtol,
        way_out,
    )


def _rows(batches: Iterable[Any], pipeline: Pipeline) -> Any:
    """The rows of batches, joined, without those that pad."""
    padded, name = pipeline.last_batch == "pad", pipeline.mask_name
    kept = [
        jax.tree.map(lambda x, mask=batch[name]: x[mask], batch) if padded else batch
        for batch in batches
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *kept)


# Sources.


def _small(length: int | None) -> int:
    """A small batch size that does not divide the length, where there is one."""
    if length is None:
        return 3
    return next((size for size in (3, 4, 5, 7) if size < length and length % size), 1)


def _spread(length: int, count: int = 6) -> list[int]:
    """Some records, the first and the last among them."""
    return sorted({i * (length - 1) // max(1, count - 1) for i in range(count)})


def _check_rows(source: EagerSourceBase, rtol: float) -> None:
    kind, picks = word(source.records), _spread(source.records)
    spec = source.element_spec

    def gather(records: jax.Array) -> Batch:
        if not source.masks:
            return source.gather(records)
        batch, readable = source.gather_readable(records)
        return batch | {"(readable)": readable}

    def read(records: Sequence[int], gather: Callable[..., Any] = gather) -> Any:
        return _snapshot(gather(jnp.asarray(np.array(records, kind))))

    alone = {record: read([record]) for record in picks}
    for record, rows in alone.items():
        batch = {name: x for name, x in rows.items() if name != "(readable)"}
        want = jax.tree.map(lambda x: np.broadcast_to(x.dtype.type(), (1, *x.shape)), spec)
        _compare(
            "SRC-003",
            f"what `element_spec` says and record {record} differ",
            want,
            batch,
            rtol,
            values=False,
        )
    asked = [*reversed(picks), picks[0], picks[0], picks[-1]]
    expected = jax.tree.map(lambda *x: np.concatenate(x), *(alone[record] for record in asked))
    order = f"the records {asked} read together and one by one differ"
    _compare(
        "SRC-012",
        order,
        expected,
        read(asked),
        rtol,
        "`gather` gives a row for every record that it is asked for, in that order",
    )
    _compare(
        "STEP-015",
        f"the records {asked} read inside and outside of `jax.jit` differ",
        expected,
        read(asked, jax.jit(gather)),
        rtol,
    )
    size = min(4, source.records)
    for start in () if source.masks else {0, source.records - size}:
        records = [*range(start, start + size)]
        ranged = _snapshot(source.gather_range(jnp.asarray(start, kind), size))
        _compare(
            "SRC-012",
            f"of the records {records}, `gather` and `gather_range` differ",
            read(records),
            ranged,
            rtol,
        )


def _check_order(source: EagerSourceBase, seed: int) -> None:
    length = len(source)
    own = type(source).order is not EagerSourceBase.order
    if not own or source.records != length or length > RECORDS:
        return
    kind = word(length)
    offsets, key = np.arange(length, dtype=kind), np.array([0, seed], np.uint32)
    order = source.order(jnp.asarray(key), jnp.arange(2, dtype=kind))
    for epoch in range(2):
        turn = jnp.full_like(offsets, epoch)
        found = np.asarray(order(jnp.asarray(offsets), turn))
        times = np.bincount(found[(found >= 0) & (found < length)], minlength=length)
        if (wrong := np.flatnonzero(times != 1)).size:
            record = int(wrong[0])
            raise LawError(
                "SHUF-001",
                f"in epoch {epoch} the `order` of the source has record {record} {times[record]} "
                f"times, and so {wrong.size} of {length} not once. For each epoch it has to be a "
                "permutation.",
            )


def _check_reader(reader: Reader) -> None:
    picks = _spread(len(reader))
    turned = [np.array(picks[i:] + picks[:i]) for i in range(len(picks))]
    first = reader.read(turned[0])
    expected = _snapshot(first)

    def back(rows: Any, i: int) -> Any:
        return jax.tree.map(lambda x: np.roll(np.asarray(x), i, axis=0), rows)

    reader.read(turned[-1])
    _compare(
        "SRC-009",
        "rows that were kept have changed with the next `read`",
        expected,
        first,
        0.0,
        "return new arrays",
    )
    with ThreadPoolExecutor(THREADS) as pool:
        turns = [i % len(picks) for i in range(THREADS * TURNS)]
        for i, rows in zip(turns, pool.map(lambda i: reader.read(turned[i]), turns), strict=True):
            _compare(
                "SRC-019",
                "rows read by several threads at once differ",
                expected,
                back(rows, i),
                0.0,
                "what threads share, a file's position say, needs a lock",
            )
    try:
        again = pickle.loads(pickle.dumps(reader))
    except (pickle.PicklingError, AttributeError, TypeError):
        return
    _compare(
        "SRC-020",
        "what a reader and a pickle of it read differs",
        expected,
        again.read(turned[0]),
        0.0,
    )


def _check_random_access(source: Any, length: int | None, seed: int, rtol: float) -> None:
    kind, key = word(length or 1), jax.random.key(seed, impl="threefry2x32")
    size = 4

    def read(start: int, size: int) -> Any:
        return _snapshot(source.get_batch_at(jnp.asarray(start, kind), size, key))

    starts = [0, 5] if length is None else sorted({0, max(0, length - 3), length - 1})
    for start in starts:
        inside = size if length is None else min(size, length - start)
        rows = [read(start + i, 1) for i in range(inside)]
        expected = jax.tree.map(lambda *x: np.concatenate(x), *rows)
        call = f"get_batch_at({start}, {size}, key)"
        found = jax.tree.map(lambda x, n=inside: x[:n], read(start, size))
        _compare(
            "SRC-013",
            f"rows of `{call}` and of calls for one row each differ",
            expected,
            found,
            rtol,
            "row `i` is that of offset `start + i`; `jax.lax.dynamic_slice` "
            "moves a slice that passes the end, and with it the rows before",
        )
        compiled = jax.jit(lambda start: source.get_batch_at(start, size, key))
        found = jax.tree.map(lambda x, n=inside: x[:n], _snapshot(compiled(kind.type(start))))
        _compare(
            "STEP-015", f"`{call}` inside and outside of `jax.jit` differ", expected, found, rtol
        )


# Comparing.


def _compare(
    law: str,
    what: str,
    expected: Any,
    got: Any,
    rtol: float,
    way_out: str = "",
    *,
    values: bool = True,
) -> None:
    """Raises if two trees of arrays differ, with the first place where they do."""
    if (where := _difference(expected, got, rtol, values)) is not None:
        more = f" {way_out[0].upper()}{way_out[1:]}." if way_out else ""
        raise LawError(law, f"{what}: {where}.{more}")


def _difference(expected: Any, got: Any, rtol: float, values: bool) -> str | None:
    if isinstance(expected, list):
        pairs = zip(expected, got, strict=True)
        found = (_difference(x, y, rtol, values) for x, y in pairs)
        return next((f"in batch {i} {x}" for i, x in enumerate(found) if x is not None), None)
    first, second = flat_fields(expected), flat_fields(got)
    if first.keys() != second.keys():
        return f"the fields are {sorted(first)} and {sorted(second)}"
    for name, x in first.items():
        x, y = (np.asarray(_plain(z)) for z in (x, second[name]))
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return f"{name!r} is {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        if values and (unequal := np.argwhere(np.logical_not(_equal(x, y, rtol)))).size:
            place = tuple(unequal[0].tolist())
            at = f"[{', '.join(map(str, place))}]" if place else ""
            return f"{name!r}{at} is {x[place]} and {y[place]}"
    return None


def _equal(x: Any, y: Any, rtol: float) -> Any:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
        return np.isclose(x.astype(wide), y.astype(wide), rtol=rtol, atol=rtol, equal_nan=True)
    return x == y
