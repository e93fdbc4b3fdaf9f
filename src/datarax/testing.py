"""Checks of your own sources, stages and pipelines against the laws of the spec.

Each check builds small pipelines around the part, reads a few batches at the start and at the end
of an epoch, and raises a `LawError` that names the broken requirement. A part that passes can be
shuffled, resumed, scanned and batched like those of the library.
"""

import copy
import itertools
import json
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ._order import word
from ._types import Batch, expect, flat_fields
from ._variables import flatten
from .pipeline import Cursor, Pipeline
from .sources import (
    EagerSourceBase,
    MemorySource,
    MemorySourceConfig,
    Reader,
    SourceData,
    Stream,
    StreamSource,
)
from .sources._base import HasGetBatchAt, length_of

__all__ = ["LawError", "check_pipeline", "check_source", "check_stage"]

BATCHES = 4
"""Consecutive batches that a check reads."""

RECORDS = 2**16
"""The longest source whose `order` is checked for being a permutation, which needs O(n) memory."""

READ = 64
"""The most rows that are compared between two batch sizes, or two passes of a stream."""

THREADS, SECONDS = 4, 0.3
"""The threads that read a source at once, and for how long at least, so that a race shows."""

FAR = 10**6
"""A large offset at which a source without an end is also read."""

SINGLE = (
    "Row `i` must depend on the offset `start + i` alone; draw its random numbers from "
    "`jax.random.fold_in(key, start + i)`"
)
CLAMPED = (
    "Row `i` must be the row at offset `start + i`; `jax.lax.dynamic_slice` shifts a slice that "
    "passes the end, and with it the rows before the end"
)


class LawError(AssertionError):
    """A part breaks the requirement `law` of the spec, such as `SRC-012`; `text` says how."""

    def __init__(self, law: str, text: str):
        self.law, self.text = law, text
        super().__init__(law, text)

    def __str__(self) -> str:
        return f"{self.law} does not hold: {self.text}"


def check_pipeline(make: Callable[[], Pipeline], *, rtol: float = 1e-5) -> None:
    """Raises unless all modes give the same batches, a state resumes, and batches are reproducible.

    It reads a few batches from the start of the first epoch, and across its end if the source has a
    length, in every mode. That takes seconds for data of any size, mostly to compile.

    Args:
        make: a function that builds the pipeline, with new stages, at every call.
        rtol: the tolerance for floats that different programs compute, since XLA may round them
            differently. It is relative to each number, or to the largest in the field for numbers
            near zero. All other values must be equal.

    Raises:
        LawError: one of SRC-009 to SRC-011, ITER-011, SCAN-001, STATE-001, STATE-005
            and STATE-022.
    """
    if isinstance(make, Pipeline):
        raise TypeError("`make` must be a function that builds a new pipeline, got a pipeline.")
    first = make()
    expect("make()", first, Pipeline)
    for place in _places(first):
        _check_at(make, place, rtol)


def check_source(
    source: Any, *, batch_size: int | None = None, seed: int = 0, rtol: float = 1e-5
) -> None:
    """Raises unless the source keeps the laws of the spec.

    The checks depend on the kind of source:

    - `gather` and `gather_range`: any records in any order give the right rows, compiled or not. An
      overridden `order` is a permutation.
    - `Reader`: the same for `read`, also from several threads at once, and from a pickled copy if
      the reader can be pickled.
    - `get_batch_at`: row `i` is the row at offset `start + i`, up to the end of an epoch.
    - `Stream`: `begin` skips the right number of records.
    - All: the checks of `check_pipeline`. Another batch size gives the same records.

    Args:
        source: the source. A large one is read in part: a few batches, and those read ahead.
        batch_size: the batch size of the pipelines over the source; by default a small one that
            does not divide the number of records.
        seed: the seed of their shuffle.
        rtol: see `check_pipeline`.

    Raises:
        LawError: a requirement of the chapter "Source", SHUF-001, STEP-009, STEP-015, or one that
            `check_pipeline` names.
        DataraxError: no pipeline accepts the source, or a record cannot be read.
    """
    wrappers = {Reader: "HostSource(reader, HostSourceConfig())", Stream: "StreamSource(stream)"}
    for kind, wrapper in wrappers.items():
        if isinstance(source, kind):
            raise TypeError(f"A {kind.__name__} is no source by itself: check {wrapper}.")
    rngs = nnx.Rngs(seed)
    # A pipeline comes first: it has the errors for objects that are no source.
    first = 1 if batch_size is None else batch_size
    built = Pipeline(source=source, batch_size=first, rngs=rngs, mask_name="(mask)")
    spec = built.element_spec
    mask_name = next(name for i in itertools.count() if (name := "mask" + i * "_") not in spec)
    length = length_of(source)
    if isinstance(source, StreamSource):
        _check_stream(source.stream)
    elif isinstance(source, EagerSourceBase):
        _check_rows(source, rtol)
        _check_order(source, seed)
        if source.reader is not None:
            _check_reader(source.reader, source.masks)
    elif isinstance(source, HasGetBatchAt):
        _check_random_access(source, length, seed, rtol)
    size = _small(length) if batch_size is None else batch_size

    def make(size: int = size) -> Pipeline:
        how = {"last_batch": "pad", "mask_name": mask_name, "rngs": rngs}
        return Pipeline(source=source, batch_size=size, **how)

    check_pipeline(make, rtol=rtol)
    _check_cut(make, size, size + 1, rtol, "A row must not depend on the batch size")


def check_stage(
    stage: Any,
    *batches: Batch,
    per_record: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
    rtol: float = 1e-5,
) -> None:
    """Raises unless the stage gives the same rows in every mode and batch size, also resumed.

    Args:
        stage: a function, an NNX module or an Equinox module. The check uses a copy of it.
        batches: one batch for each predecessor of the stage, all with the same number of rows. The
            check shuffles the rows.
        per_record: whether each row of the output depends on one record alone. Use False for a
            stage that mixes the rows of a batch or counts batches; the batch size may then matter.
        batch_size: the batch size of the pipelines around the stage; by default the largest
            divisor of the number of rows, other than that number itself.
        seed: the seed of the stage's keys.
        rtol: see `check_pipeline`.

    Raises:
        LawError: STEP-009 where the batch size changes a row, or a law that `check_pipeline` names.
    """
    if not batches:
        raise ValueError("`check_stage` needs a batch to call the stage with, got none.")
    names = [f"input {i}" for i in range(len(batches))]
    stored = MemorySource(MemorySourceConfig(), dict(zip(names, batches, strict=True)))
    rows = len(stored)
    # With sorted rows, a stage that sorts would pass.
    mixed = np.random.default_rng(0).permutation(rows)
    source = MemorySource(
        MemorySourceConfig(), stored.gather(jnp.asarray(mixed.astype(word(rows))))
    )
    each = batch_size
    if each is None:
        each = next((n for n in range(rows // 2, 0, -1) if rows % n == 0), 1)

    def make(size: int = each) -> Pipeline:
        nodes = {name: _Input(name) for name in names} | {"stage": copy.deepcopy(stage)}
        return Pipeline.from_dag(
            source=source,
            nodes=nodes,
            edges={name: [] for name in names} | {"stage": names},
            sink="stage",
            batch_size=size,
            rngs=nnx.Rngs(seed),
        )

    check_pipeline(make, rtol=rtol)
    if per_record:
        for name, x in flat_fields(make().element_spec).items():
            if x.shape[:1] != (each,):
                raise LawError(
                    "STEP-009",
                    f"for {each} records, {name!r} has the shape {x.shape}. Give a row for each "
                    "record, or pass `per_record=False`.",
                )
        way_out = (
            "A row must depend on its own record alone, not on its neighbours or its place in the "
            "batch, and draw random numbers from `keys`, one for each record; pass "
            "`per_record=False` if the stage is to mix rows or to count batches"
        )
        _check_cut(make, each, rows if each < rows else 1, rtol, way_out)


class _Input:
    """A stage that returns one of the nested batches of the source."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, batch: Batch) -> Batch:
        return batch[self.name]


# Pipelines.


class _Run(NamedTuple):
    """Batches, and the Variables and the cursor of the pipeline after them."""

    batches: list[Any]
    after: dict[str, Any]


def _places(pipeline: Pipeline) -> list[Cursor]:
    """The cursors to read from: the start, and one close enough to the end of the first epoch."""
    length, size = length_of(pipeline.source), pipeline.batch_size
    if length is None or length <= size * (BATCHES - 1):
        return [Cursor(0, 0)]
    near = (length // size - BATCHES + 2) * size
    return [Cursor(0, 0), Cursor(0, near)]


def _check_at(make: Callable[[], Pipeline], place: Cursor, rtol: float) -> None:
    def at_place() -> Pipeline:
        pipeline = make()
        if place != (0, 0):
            pipeline.seek(epoch=place.epoch, offset=place.offset)
        return pipeline

    def at(run: Callable[[Pipeline, int], list[Any]]) -> _Run:
        pipeline = at_place()
        return _Run(run(pipeline, BATCHES), _remembered(pipeline))

    where, pipeline = f"from {tuple(place)} on", at_place()
    kept: list[Any] = []
    drawn = random.getstate(), np.random.get_state()
    stepped = at(lambda pipeline, count: _by_step(pipeline, count, kept))
    # The state of `random` proves nothing: beartype draws from it which items to check.
    moved = not all(map(np.array_equal, np.random.get_state(), drawn[1]))
    _compare("SRC-009", f"batches {where} that were kept have changed", stepped.batches, kept, 0.0)
    try:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        what = f"of two pipelines that were built alike, batches {where}"
        way_out = "Build all of it anew, and draw only from generators with a fixed seed"
        _same("SRC-011", what, stepped, at(_by_step), rtol, way_out)
        random.seed(1)
        np.random.seed(1)
        what = f"under two global seeds of `random` and `np.random`, batches {where}"
        way_out = "Draw from the keys of the pipeline"
        _same("SRC-010", what, stepped, at(_by_step), rtol, way_out)
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
    if moved:
        raise LawError(
            "SRC-010",
            f"the global generator of `np.random` has moved while batches {where} were made. "
            f"{way_out}.",
        )

    looped = at(_by_for)
    alike = _cut_alike(pipeline, place, looped.batches)
    what = f"of `step` and `for`, batches {where} differ"
    _compare("ITER-011", what, stepped.batches[:alike], looped.batches[:alike], rtol)
    if alike == BATCHES:
        _same("ITER-011", f"of `step` and `for`, batches {where}", stepped, looped, rtol)
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


def _cut_alike(pipeline: Pipeline, place: Cursor, looped: Sequence[Any]) -> int:
    """The number of batches that `for` cuts as `step` does, until "keep" gives a shorter one."""
    length, size = length_of(pipeline.source), pipeline.batch_size
    if pipeline.last_batch != "keep" or (length is not None and length % size == 0):
        return BATCHES
    if length is not None:
        return min(BATCHES, (length - place.offset) // size)
    rows = map(_rows_of, looped)  # a stream shows the end of its epoch only so
    most = max(map(_rows_of, looped))
    return sum(1 for _ in itertools.takewhile(lambda count: count == most, rows))


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
    """A copy of a batch as NumPy arrays."""
    return jax.tree.map(lambda x: np.array(_plain(x)), batch)


def _plain(x: Any) -> Any:
    x = x if hasattr(x, "dtype") else jnp.asarray(x)  # a Python number, in the type JAX gives it
    typed = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if typed else x


def _rows_of(batch: Any) -> int:
    return len(jax.tree.leaves(batch)[0])


def _remembered(pipeline: Pipeline) -> dict[str, Any]:
    """The Variables of a pipeline by path, without `SourceData`, and its cursor."""
    data, state = nnx.state(pipeline, SourceData, ...)
    del data
    cursor = {"cursor": np.array(pipeline.cursor)}
    return {
        ".".join(map(str, (*path, i))): np.array(_plain(leaf))
        for path, variable in nnx.to_flat_state(state)
        for i, leaf in enumerate(jax.tree.leaves(variable))
    } | cursor


def _same(law: str, what: str, expected: _Run, got: _Run, rtol: float, way_out: str = "") -> None:
    _compare(law, f"{what} differ", expected.batches, got.batches, rtol, way_out)
    what = f"{what} are equal, but what is remembered differs"
    _compare(law, what, expected.after, got.after, rtol, way_out)


def _check_cut(
    make: Callable[[int], Pipeline], one: int, other: int, rtol: float, way_out: str
) -> None:
    """Raises unless batches of the sizes `one` and `other` have the same rows, over two epochs."""
    found = []
    for size in (one, other):
        pipeline = make(size)
        length = length_of(pipeline.source)
        rows = min(READ, one * other if length is None else length)
        loops = itertools.chain.from_iterable(iter(pipeline) for _ in range(2))
        batches = itertools.islice(loops, -(-rows // size) + 1)
        found.append(_rows(map(_snapshot, batches), pipeline))
    shared = min(map(_rows_of, found))
    first, second = (jax.tree.map(lambda x: x[:shared], rows) for rows in found)
    what = f"records in batches of {one} and in batches of {other} differ"
    _compare("STEP-009", what, first, second, rtol, way_out)


def _rows(batches: Iterable[Any], pipeline: Pipeline) -> Any:
    """The concatenated rows of batches, without padding."""
    padded, name = pipeline.last_batch == "pad", pipeline.mask_name
    kept = [
        jax.tree.map(lambda x, mask=batch[name]: x[mask], batch) if padded else batch
        for batch in batches
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *kept)


# Sources.


def _small(length: int | None) -> int:
    """A small batch size that does not divide the length, if possible."""
    if length is None:
        return 3
    return next((size for size in (3, 4, 5, 7) if size < length and length % size), 1)


def _spread(length: int, count: int = 6) -> list[int]:
    """Up to `count` records, evenly spread from the first to the last."""
    return sorted({i * (length - 1) // max(1, count - 1) for i in range(count)})


def _check_rows(source: EagerSourceBase, rtol: float) -> None:
    kind, picks, reader = word(source.records), _spread(source.records), source.reader

    def read(records: Sequence[int]) -> Any:
        asked = np.array(records, kind)
        if reader is None:
            return _snapshot(source.gather(jnp.asarray(asked)))
        batch, readable, _ = reader.rows_and_holes(asked, reader.element_spec)
        return _snapshot(batch) | {"(readable)": readable}

    if reader is not None and not source.masks:
        reader.rows(np.array(picks, kind), reader.element_spec)  # raises for an unreadable record
    call = "gather" if reader is None else "read"
    alone = {record: read([record]) for record in picks}
    for record, rows in alone.items():
        found = flat_fields(rows)
        for name, x in flat_fields(source.element_spec).items():
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                continue
            row = f"{y.dtype}{list(y.shape[1:])}" if (y := found.get(name)) is not None else "none"
            if row != (wanted := f"{x.dtype}{list(x.shape)}"):
                raise LawError(
                    "SRC-003",
                    f"a row of {name!r} is {wanted} by `element_spec`, but {row} where `{call}` "
                    f"has read record {record}.",
                )
    asked = [*reversed(picks), picks[0], picks[0], picks[-1]]
    expected = jax.tree.map(lambda *x: np.concatenate(x), *(alone[record] for record in asked))
    again = f"the same records, {asked}, read twice differ"
    _compare("SRC-012", again, read(asked), read(asked), 0.0, "Let nothing else decide a row")
    order = f"the records {asked} read together and one by one differ"
    way_out = f"`{call}` gives a row for every record that it is asked for, in that order"
    computed = rtol if reader is None else 0.0  # XLA may round one row and several differently
    _compare("SRC-012", order, expected, read(asked), computed, way_out)
    if reader is not None:
        return
    compiled = _snapshot(_compiled(source, "gather")(np.array(asked, kind)))
    what = f"the records {asked} read inside and outside of `jax.jit` differ"
    _compare("STEP-015", what, expected, compiled, rtol)
    size = min(4, source.records)
    for start in {0, source.records - size}:
        records = [*range(start, start + size)]
        ranged = _snapshot(source.gather_range(jnp.asarray(start, kind), size))
        what = f"of the records {records}, `gather` and `gather_range` differ"
        _compare("SRC-012", what, read(records), ranged, rtol)


def _compiled(source: Any, method: str, *more: Any) -> Callable[[Any], Any]:
    """The method as a compiled function of its first argument; `more` are the others.

    The source's arrays are arguments of the program, as in a pipeline.
    """
    graphdef, flat = flatten(source)

    @jax.jit
    def call(leaves: list[Any], x: Any) -> Any:
        return getattr(nnx.graph.unflatten(graphdef, leaves), method)(x, *more)

    return lambda x: call(list(flat.leaves), x)


def _check_order(source: EagerSourceBase, seed: int) -> None:
    length = len(source)
    own = type(source).order is not EagerSourceBase.order
    if not own or source.records != length or length > RECORDS:
        return
    kind = word(length)
    offsets, key = jnp.arange(length, dtype=kind), jnp.array([0, seed], jnp.uint32)
    order = source.order(key, jnp.arange(2, dtype=kind))
    for epoch in range(2):
        found = np.asarray(order(offsets, jnp.full_like(offsets, epoch)))
        times = np.bincount(found[(found >= 0) & (found < length)], minlength=length)
        if (wrong := np.flatnonzero(times != 1)).size:
            record = int(wrong[0])
            raise LawError(
                "SHUF-001",
                f"in epoch {epoch} the `order` of the source has record {record} {times[record]} "
                f"times; {wrong.size} of {length} records do not come once. In every epoch it has "
                "to be a permutation.",
            )


def _check_reader(reader: Reader, masks: bool) -> None:
    picks = _spread(len(reader))
    if masks:
        picks = [record for record in picks if _is_readable(reader, record)]
    if not picks:
        return
    turned = [np.array(picks[i:] + picks[:i]) for i in range(len(picks))]
    first = reader.read(turned[0].copy())  # a copy, since `read` may write to it
    expected = _snapshot(first)

    def back(rows: Any, i: int) -> Any:
        return jax.tree.map(lambda x: np.roll(np.asarray(x), i, axis=0), rows)

    reader.read(turned[-1].copy())
    kept = "rows that were kept have changed with the next `read`"
    _compare("SRC-009", kept, expected, first, 0.0, "Return new arrays")
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)  # switch threads often, so that a race shows sooner
        with ThreadPoolExecutor(THREADS) as pool:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                turns = [i % len(picks) for i in range(4 * THREADS)]
                found = pool.map(lambda i: reader.read(turned[i].copy()), turns)
                for i, rows in zip(turns, found, strict=True):
                    what = "rows read by several threads at once differ"
                    way_out = "What threads share, such as the position in a file, needs a lock"
                    _compare("SRC-019", what, expected, back(rows, i), 0.0, way_out)
    finally:
        sys.setswitchinterval(interval)
    try:
        again = pickle.loads(pickle.dumps(reader))
    except (pickle.PicklingError, AttributeError, TypeError):
        return
    what = "what a reader and a pickle of it read differs"
    _compare("SRC-020", what, expected, again.read(turned[0].copy()), 0.0)


def _is_readable(reader: Reader, record: int) -> bool:
    try:
        reader.read(np.array([record]))
    except Exception:
        return False
    return True


def _check_stream(stream: Stream) -> None:
    def begun(epoch: int, skip: int, count: int) -> list[Any]:
        records = itertools.islice(iter(stream.begin(epoch, skip)), count)
        return [jax.tree.map(np.array, x) for x in records]  # copies: a stream may reuse memory

    for epoch in range(2):
        first, again = begun(epoch, 0, READ), begun(epoch, 0, READ)
        what = f"two passes that `begin({epoch}, 0)` has begun"
        way_out = "Begin with a new iterator each time, and let nothing but the epoch decide"
        _compare("SRC-011", f"{what} differ", first, again, 0.0, way_out)
        for skip in (1, 5):
            rest = begun(epoch, skip, len(first[skip : skip + 3]))
            what = (
                f"`begin({epoch}, {skip})` and `begin({epoch}, 0)` without its first {skip} differ"
            )
            way_out = "`skip` is the number of records to leave out"
            _compare("SRC-028", what, rest, first[skip : skip + 3], 0.0, way_out)


def _check_random_access(source: Any, length: int | None, seed: int, rtol: float) -> None:
    kind, key = word(length or 1), jax.random.key(seed, impl="threefry2x32")
    size = 4

    def read(start: Any, size: int) -> Any:
        return source.get_batch_at(jnp.asarray(start, kind), size, key)

    compiled = _compiled(source, "get_batch_at", size, key)
    starts = [0, 5, FAR] if length is None else sorted({0, max(0, length - 3), length - 1})
    for start in starts:
        inside = size if length is None else min(size, length - start)
        call = f"get_batch_at({start}, {size}, key)"
        rows = [_snapshot(read(start + i, 1)) for i in range(inside)]
        expected = jax.tree.map(lambda *x: np.concatenate(x), *rows)
        whole, within = _snapshot(read(start, size)), _snapshot(compiled(kind.type(start)))
        found, traced = (jax.tree.map(lambda x, n=inside: x[:n], rows) for rows in (whole, within))
        what = f"rows of `{call}` and of calls for one row each differ"
        way_out = SINGLE if inside == size and start != FAR else CLAMPED
        _compare("SRC-013", what, expected, found, rtol, way_out)
        what = f"`{call}` inside and outside of `jax.jit` differ"
        _compare("STEP-015", what, expected, traced, rtol)


# Comparing.


def _compare(law: str, what: str, expected: Any, got: Any, rtol: float, way_out: str = "") -> None:
    """Raises if two trees of arrays differ, with the first place where they do."""
    if (where := _difference(expected, got, rtol)) is not None:
        more = f" {way_out}." if way_out else ""
        raise LawError(law, f"{what}: {where}.{more}")


def _difference(expected: Any, got: Any, rtol: float) -> str | None:
    if isinstance(expected, list):
        if len(expected) != len(got):
            return f"there are {len(expected)} and {len(got)}"
        found = (_difference(x, y, rtol) for x, y in zip(expected, got, strict=True))
        return next((f"at index {i}, {x}" for i, x in enumerate(found) if x is not None), None)
    first, second = flat_fields(expected), flat_fields(got)
    if first.keys() != second.keys():
        return f"the fields are {sorted(first)} and {sorted(second)}"
    for name, x in first.items():
        x, y = (np.asarray(_plain(z)) for z in (x, second[name]))
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            return f"{name!r} is {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
        if len(unequal := np.argwhere(np.logical_not(_equal(x, y, rtol)))):  # also without an axis
            place = tuple(unequal[0].tolist())
            at = f"[{', '.join(map(str, place))}]" if place else ""
            return f"{name!r}{at} is {x[place]} and {y[place]}"
    return None


def _equal(x: Any, y: Any, rtol: float) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x == y
    wide = np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
    x, y = x.astype(wide), y.astype(wide)
    finite = np.abs(x[np.isfinite(x)])
    near_zero = rtol * finite.max() if finite.size else 0.0
    return np.isclose(x, y, rtol=rtol, atol=near_zero, equal_nan=True)
