"""Rows a second from the page cache, beside NumPy, Grain and torch on the same file, one run.

Every path hands out batches of the same size from the same file, all of them in every round and
in turns, so that they meet the same noise: what counts is the median over the rounds of the ratio
within each. Where there are enough rounds in which nobody else used the machine, only these count.
Of the batches of the others each is memory of its own too, as it must be for whoever keeps two.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from flax import nnx

from datarax import Pipeline
from datarax.sources import (
    HostSource,
    HostSourceConfig,
    Reader,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
)

BATCH, ROUNDS, THREADS, FILE, EPOCHS = 1024, 15, 2, 400 * 2**20, 4
ENOUGH = 0.9
"""Of what NumPy gives with as many threads."""
QUIET, PATIENCE = 9, 60
"""Rounds on a machine that nobody else uses, and the seconds to wait for them."""


@pytest.fixture(scope="module", params=[1, 16], ids="{} MiB a batch".format)
def data(request, tmp_path_factory):
    """A file in the page cache, as a memory map."""
    path = tmp_path_factory.mktemp("file") / "x.npy"
    width = request.param * 2**20 // BATCH // 4
    shape = FILE // width // 4, width
    np.save(path, np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    yield np.load(path, mmap_mode="r")
    path.unlink()


def again_and_again(batches, count):
    """So many batches, however many an epoch has."""
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), count)


def by_numpy(data, shuffle):
    order = np.random.default_rng(0).permutation(len(data))
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)

    def part(i):
        i %= len(data) // BATCH
        if shuffle:
            return data[order[i * BATCH : (i + 1) * BATCH]]
        out = np.empty((BATCH, data.shape[1]), np.float32)
        np.copyto(out, data[i * BATCH : (i + 1) * BATCH])
        return out

    return lambda count: pool.map(part, range(count))


def pipeline_over(data, shuffle):
    config = StreamingDiskSourceConfig(path=data.filename, shuffle=shuffle)
    return Pipeline(
        source=StreamingDiskSource(config),
        batch_size=BATCH,
        rngs=nnx.Rngs(0),
        last_batch="drop",
        num_threads=THREADS,
    )


def by_for(data, shuffle):
    pipeline = pipeline_over(data, shuffle)

    def batches(count):
        pipeline.reset()
        return map(jax.block_until_ready, again_and_again(pipeline, count))

    return batches


def by_scan(data, shuffle):
    pipeline = pipeline_over(data, shuffle)

    def batches(count):
        pipeline.reset()
        return [jax.block_until_ready(pipeline.scan(first_number, count))]

    return batches


def first_number(batch):
    """Next to no work, as the other loops have none."""
    return batch["data"][0, 0]


def by_grain(data, shuffle):
    import grain

    dataset = grain.MapDataset.source(data)
    dataset = (dataset.shuffle(seed=0) if shuffle else dataset).batch(BATCH)
    options = grain.ReadOptions(num_threads=THREADS)
    return lambda count: again_and_again(dataset.to_iter_dataset(options), count)


def by_torch(data, shuffle):
    import torch

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            return data[i]

        def __getitems__(self, places):
            return data[places]

    loader = torch.utils.data.DataLoader(
        Rows(), BATCH, shuffle=shuffle, collate_fn=np.asarray, num_workers=0
    )
    return lambda count: again_and_again(loader, count)


def by_torch_placed(data, shuffle):
    """What `for` hands out too: arrays that JAX can compute with."""
    batches = by_torch(data, shuffle)
    return lambda count: map(jax.block_until_ready, map(jax.device_put, batches(count)))


WAYS = {
    "numpy": by_numpy,
    "for": by_for,
    "scan": by_scan,
    "grain": by_grain,
    "torch": by_torch,
    "torch to JAX": by_torch_placed,
}


def by_others():
    """The processor time that other processes have used so far, and what hypervisors took."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - time.process_time()


def rest():
    """Until what was read ahead for a loop that has ended takes no time from the next one."""
    used = 1.0
    while used > 1e-3:
        before = time.process_time()
        time.sleep(0.02)
        used = time.process_time() - before


@pytest.mark.spec("SRC-038")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shuffle", [False, True], ids=["sequential", "shuffled"])
def test_throughput(data, shuffle):
    batches, found, absent = EPOCHS * (len(data) // BATCH), {}, []
    for name, way in WAYS.items():
        try:
            found[name] = way(data, shuffle)
        except ImportError:
            absent.append(name)
    rounds, quiet, until = [], [], time.monotonic() + PATIENCE
    while len(rounds) < ROUNDS or (len(quiet) < QUIET and time.monotonic() < until):
        seconds, cores, disturbed = {}, {}, False
        for name, way in list(found.items())[:: 1 if len(rounds) % 2 else -1]:
            # Grain goes record by record: some batches say what all would.
            count = max(batches // 100, 5) if name == "grain" else batches
            rest()
            start, mine, theirs = time.perf_counter(), time.process_time(), by_others()
            for _ in way(count):
                pass
            whole = time.perf_counter() - start
            seconds[name], cores[name] = whole / count, (time.process_time() - mine) / whole
            disturbed |= by_others() - theirs > 0.2 * whole
        rounds.append((seconds, cores))
        if not disturbed:
            quiet.append((seconds, cores))
    free = len(quiet) >= QUIET
    rounds = quiet if free else rounds

    def median(of):
        return statistics.median(of(*x) for x in rounds)

    def ahead(name, other):
        return median(lambda seconds, _: seconds[other] / seconds[name])

    size = BATCH * data.shape[1] * 4
    print(f"\n  {size >> 20} MiB a batch, {'shuffled' if shuffle else 'sequential'}", end="")
    print(f"{', without ' + ' and '.join(absent) if absent else ''}", end="")
    print(f", {len(rounds)} rounds", end=":\n" if free else ", while others used the machine:\n")
    for name in found:
        each = median(lambda seconds, _, name=name: seconds[name])
        busy = median(lambda _, cores, name=name: cores[name])
        print(
            f"  {name:12} {size / each / 2**30:6.2f} GiB/s, {ahead(name, 'numpy'):5.2f} of numpy, "
            f"{each * 1e6:6.0f} us each, on {busy:.1f} cores"
        )
    for name in ("for", "scan"):
        assert ahead(name, "numpy") >= ENOUGH, name
        for other in ("grain", "torch"):
            assert other not in found or ahead(name, other) > 1, (name, other)


@dataclasses.dataclass(frozen=True)
class Asleep(Reader):
    """Rows that take their time, asleep as on a disk and not on the processor."""

    def __len__(self):
        return 64 * 32

    @property
    def stored_spec(self):
        return {"data": jax.ShapeDtypeStruct((1,), np.dtype(np.float32))}

    def read(self, records):
        time.sleep(len(records) * 1e-4)
        return {"data": records[:, None].astype(np.float32)}


@pytest.mark.spec("SRC-038")
@pytest.mark.parametrize("mode", ["for", "scan"])
@pytest.mark.parametrize("storage", ["asleep", "file"])
def test_reading_and_computing_overlap(storage, mode, tmp_path):
    """One thread reads and one computes, so two cores are enough, if nobody else takes them."""
    if storage == "file":
        np.save(tmp_path / "x.npy", np.ones((64 * 16, 2**16), np.float32))  # 16 MiB a batch
        config = StreamingDiskSourceConfig(path=tmp_path / "x.npy", shuffle=True)
        source = StreamingDiskSource(config)
    else:
        source = HostSource(Asleep(), HostSourceConfig(shuffle=True))
    pipeline = Pipeline(source=source, batch_size=64, num_threads=1, rngs=nnx.Rngs(0))
    batches, epochs, reader = len(pipeline), 1 if storage == "asleep" else 8, source.reader
    order = np.random.default_rng(0).permutation(len(reader)).astype(np.uint32)
    turns = jnp.arange(100_000)

    def step(batch):
        # A chain of small operations, which XLA leaves in one thread.
        first = batch["data"][0, 0]
        return jax.lax.fori_loop(0, turns.size, lambda i, x: jnp.tanh(x + turns[i]), first)

    compiled = jax.jit(step)
    fixed = {"data": jnp.zeros((64, 1))}

    def read():
        ahead = collections.deque(maxlen=4)  # memory as whoever reads ahead needs it
        for i in [*range(batches)] * epochs:
            ahead.append(reader.rows(order[64 * i : 64 * i + 64], reader.element_spec))

    def compute():
        for _ in range(batches * epochs):
            jax.block_until_ready(compiled(fixed))

    def by_hand():
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            reading = other.submit(read)
            compute()
            reading.result()

    def consume():
        pipeline.reset()
        if mode == "scan":
            jax.block_until_ready(pipeline.scan(step, batches * epochs))
        else:
            for batch in itertools.chain.from_iterable([pipeline] * epochs):
                jax.block_until_ready(compiled(batch))

    best = {}
    for _ in range(ROUNDS):
        for way in (read, compute, by_hand, consume):
            start = time.perf_counter()
            way()
            best[way] = min(best.get(way, np.inf), time.perf_counter() - start)
    longer = max(best[read], best[compute])
    ratio, hand = best[consume] / longer, best[by_hand] / longer
    print(
        f"\n  {storage}, {mode}: reading {best[read] * 1e3:.0f} ms, computing "
        f"{best[compute] * 1e3:.0f} ms, both {best[consume] * 1e3:.0f} ms: {ratio:.2f} of the "
        f"longer; two threads without a pipeline {hand:.2f}"
    )
    if hand > 1.1:
        print("  The machine had no second core to spare for two plain threads either.")
    assert ratio <= 1.15


@pytest.mark.spec("SHUF-013")
def test_the_first_shuffled_batch_does_not_wait_for_the_length(tmp_path):
    times = {}
    for n in (1_000, 10_000_000):
        path = tmp_path / f"{n}.npy"
        np.save(path, np.arange(n, dtype=np.int32))
    for _ in range(7):
        for n in (1_000, 10_000_000):
            config = StreamingDiskSourceConfig(path=tmp_path / f"{n}.npy", shuffle=True)
            jax.clear_caches()
            start = time.perf_counter()
            pipeline = Pipeline(
                source=StreamingDiskSource(config), batch_size=256, rngs=nnx.Rngs(0)
            )
            jax.block_until_ready(next(iter(pipeline)))
            times.setdefault(n, []).append(time.perf_counter() - start)
    few, many = (min(x) for x in times.values())
    print(f"\n  first batch: {few * 1e3:.0f} ms of 1e3 records, {many * 1e3:.0f} ms of 1e7")
    assert many <= 1.2 * few
