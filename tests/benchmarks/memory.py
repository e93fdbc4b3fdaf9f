"""Resident memory: measured in a separate process, and judged by one explicit rule.

The figure is Linux's high-water mark of the process itself. `ru_maxrss` will not do: a child
process starts with its parent's.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

MIB = 2**20
STATUS = Path("/proc/self/status")


class Verdict(NamedTuple):
    outcome: Literal["pass", "fail", "skip"]
    reason: str


def classify_rss_comparison(
    ours: float,
    peer: float | None,
    *,
    size: float,
    cap: float = 1.10,
    margin: float = 1.05,
    null: float = 0.02,
) -> Verdict:
    """The verdict on a pipeline's peak memory, compared with a peer's on the same data.

    All are in bytes. `ours` and `peer` are peaks above what each process took before it had the
    data, `size` is the size of the data. The rules are, in this order:

    - more than `cap` times the data fails, whatever the peer does or whether there is one;
    - without a peer, or with one below `null` times the data, there is nothing to compare with.
      Such a peer maps the data, or had loaded them before it was measured;
    - at most `margin` times the peer passes, more fails.
    """
    for name, value in {"ours": ours, "peer": peer, "size": size}.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be a number of bytes, got {value!r}.")
    if size == 0:
        raise ValueError("`size` must be positive: nothing is compared with no data.")
    found = f"{ours / MIB:.1f} MiB for {size / MIB:.1f} MiB of data"
    if ours > cap * size:
        return Verdict("fail", f"hard cap: {found} is more than {cap:g} times the data")
    if peer is None:
        return Verdict("skip", f"no peer: {found} is below the cap, and the peer was not measured")
    if peer < null * size:
        return Verdict(
            "skip",
            f"null floor: the peer took {peer / MIB:.1f} MiB, so it is zero-copy or was preloaded "
            f"before it was measured; {found} is below the cap",
        )
    relation = f"{found}, the peer took {peer / MIB:.1f} MiB"
    if ours <= margin * peer:
        return Verdict("pass", relation)
    return Verdict("fail", f"{relation}: more than {margin:g} times as much")


def resident() -> int:
    """Bytes that this process has in memory now."""
    return _status("VmRSS")


def peak() -> int:
    """The most that this process ever had in memory."""
    return _status("VmHWM")


def is_measurable() -> bool:
    return STATUS.exists()


def _status(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}.")


def in_own_process(task: str, **arguments: Any) -> dict[str, float]:
    """The figures of a task of this file, from a process that does nothing else."""
    command = [sys.executable, "-m", "benchmarks.memory", task, json.dumps(arguments)]
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# The tasks. Each has its own imports, since imported modules count as memory.


def epoch(mode: str, shuffle: bool, mebibytes: int) -> dict[str, float]:
    """The peak over an epoch of images, above that of a small epoch of the same kind."""

    import numpy as np
    from benchmarks.workloads import Workload, ours

    def images(length: int) -> dict[str, np.ndarray]:
        return {"image": np.random.default_rng(0).integers(0, 256, (length, 32, 32, 3), np.uint8)}

    def run(data: dict[str, np.ndarray]) -> None:
        length = len(data["image"])
        work = Workload(name="images", data=lambda: data, batch_size=64, timed=length // 64)
        ours(work, shuffle, mode).run()

    run(images(64 * 16))
    base = peak()
    data = images(mebibytes * MIB // (32 * 32 * 3))
    run(data)
    return {"base": base, "peak": peak() - base, "size": data["image"].nbytes}


def batches(count: int) -> dict[str, float]:
    """How much memory `count` batches leave behind."""
    made = _small_pipeline()
    handed = 0

    def run(until: int) -> int:
        nonlocal handed
        while handed < until:
            for _ in made:
                handed += 1
        return _settled()

    before = run(count // 10)
    return {"grown": run(count + count // 10) - before}


def pipelines(count: int) -> dict[str, float]:
    """How much memory `count` pipelines leave behind, each used in all three ways and dropped."""
    from benchmarks.workloads import reduce

    def run(times: int) -> int:
        for _ in range(times):
            made = _small_pipeline()
            made.step()
            next(iter(made))
            made.scan(reduce, 2)
        return _settled()

    before = run(count // 10)
    return {"grown": run(count) - before}


def _small_pipeline(batch_size: int = 64) -> Any:
    from benchmarks.workloads import pipeline, tabular

    return pipeline(tabular("small", depth=1, batch_size=batch_size), shuffle=True)


def _settled() -> int:
    import gc

    gc.collect()
    return resident()


TASKS: dict[str, Callable[..., dict[str, float]]] = {
    task.__name__: task for task in (epoch, batches, pipelines)
}

if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
