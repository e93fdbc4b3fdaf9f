"""The rows of the budget other than workloads in a mode: the order, compiling, memory."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from benchmarks import memory
from benchmarks.harness import Estimate, Side, cold, median
from benchmarks.workloads import MODES, Workload, check, floor, ours, pipeline, table, tabular

from datarax._order import SwapOrNot, keys_of

MILLION = 1_000_000
LARGE = 288
"""MiB of images: enough that a copy of the data stands out from all other memory."""

LEFT_BEHIND = 4
"""MiB that 10^5 batches, or 10^3 pipelines, may leave behind: under one object for each batch."""

ITS_OWN = 9_999
"""The number of records for programs that are compiled here. The workloads have others, so that
JAX must compile theirs again."""

pytestmark = pytest.mark.benchmark(group="budget")
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not memory.is_measurable(),
    reason="memory is measured on Linux, with the data on the host",
)


def exactly(value: float) -> Estimate:
    """A count, which has no uncertainty."""
    return Estimate(value, value, value)


def bench_shuffled_million(compare):
    work = Workload(
        name="1e6 records",
        data=functools.partial(table, MILLION, 32),
        batch_size=1024,
        timed=200,
    )
    us, ours_first, _ = cold(lambda: ours(work, True, "scan"))
    hand, its_first, _ = cold(lambda: floor(work, True, "scan"))
    check(us, hand, (ours_first, its_first))
    title = "`scan`, 1e6 shuffled records of 32 numbers, against gathering by a given permutation"
    compare(us, hand, budget=1.3, title=title, batches=work.batches)


def bench_full_order(compare):
    @jax.jit
    def order(epoch):
        keys = keys_of(np.zeros(2, np.uint32), epoch[None])
        return SwapOrNot(keys, MILLION)(jnp.arange(MILLION, dtype=jnp.uint32))

    numpy = np.random.default_rng(0)
    compare(
        Side(lambda: None, lambda: order(jnp.uint32(0))),
        Side(lambda: None, lambda: numpy.permutation(MILLION)),
        budget=1.0,
        title="the whole order of 1e6 records, against `numpy.random.Generator.permutation`",
    )


def bench_retrace(benchmark, row):
    made, traces = pipeline(tabular("retrace", depth=2, length=ITS_OWN), shuffle=True), 0

    def use(batch):
        nonlocal traces
        traces += 1
        return batch["features"].sum()

    def other(batch):
        return batch["features"].mean()

    def drive():
        made.scan(use, 8)
        made.scan(other, 8)
        made.scan(other, 3)
        made.step()
        next(iter(made))
        made.seek(epoch=3, offset=17)
        pipeline(tabular("retrace", depth=1, length=ITS_OWN), shuffle=False).scan(use, 8)

    drive()
    first = traces
    benchmark.pedantic(drive, rounds=5)
    title = "`scan` of the same function and length again, whatever else ran in between"
    row(exactly(traces - first), unit="traces", budget=0, title=title)


def bench_import(benchmark, row):
    task = "import time, jax, flax.nnx; t = time.process_time(); import datarax; "
    task += "print(time.process_time() - t)"
    # Let Python write bytecode: an installed package has it, as JAX and Flax do here.
    plain = {name: x for name, x in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    run = functools.partial(
        subprocess.run, [sys.executable, "-c", task], check=True, capture_output=True, text=True
    )
    run(env=plain)
    took = []
    benchmark.pedantic(lambda: took.append(float(run(env=plain).stdout)), rounds=11)
    title = "importing `datarax`, over JAX and Flax, in processor time"
    row(median(took), unit="s", budget=0.15, title=title)


def bench_compile_shuffled(benchmark, row):
    more = []

    def drive():
        jax.clear_caches()
        work = tabular("compile", length=ITS_OWN - 1 - len(more), depth=2)
        stored, shuffled = (cold(lambda s=s: ours(work, s, "scan"))[2] for s in (False, True))
        more.append(shuffled["first"] - stored["first"])

    benchmark.pedantic(drive, rounds=5)
    title = "compiling a shuffled `scan`, over an unshuffled one"
    row(median(more), unit="s", budget=1.0, title=title)


@on_cpu
@pytest.mark.parametrize("shuffle", [False, True], ids=["stored", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
def bench_peak_memory(benchmark, row, mode, shuffle):
    task = functools.partial(
        memory.in_own_process, "epoch", mode=mode, shuffle=shuffle, mebibytes=LARGE
    )
    took = benchmark.pedantic(task)
    order = "shuffled" if shuffle else "stored"
    title = f"peak memory of an epoch over {LARGE} MiB of NumPy data, `{mode}`, {order}"
    row(exactly(took["peak"] / took["size"]), unit="x data", budget=1.1, title=title, **took)


@on_cpu
@pytest.mark.parametrize("task, count", [("batches", 100_000), ("pipelines", 1_000)])
def bench_left_behind(benchmark, row, task, count):
    took = benchmark.pedantic(memory.in_own_process, args=(task,), kwargs={"count": count})
    title = f"memory that {count:,} {task} leave behind"
    row(exactly(took["grown"] / memory.MIB), unit="MiB", budget=LEFT_BEHIND, title=title)
