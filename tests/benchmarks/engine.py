"""Runs one engine in its own process: times its epochs, and tells which rows it handed out.

It is driven like an engine of the conformance suite, through the same adapter, and needs only NumPy
and the engine. Batches are kept while the clock runs, and read after it has stopped.
"""

import array
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from benchmarks.memory import peak
from datarax_conformance.adapter import Adapter, Program
from datarax_conformance.serve import serve
from datarax_conformance.session import Session

COMPILING = "/jax/core/compile/"
CHUNK = 16
"""Batches of one scan when memory is measured. A scan of all of them would copy the data."""
SIZE = 16
"""Bytes of the digest of a row."""


class Timer(Session):
    """The actions `build`, `epochs` and `weigh`, in addition to those of the suite."""

    def __init__(self, adapter: Adapter):
        super().__init__(adapter)
        self.compiling = 0.0
        if jax := sys.modules.get("jax"):
            jax.monitoring.register_event_duration_secs_listener(self._note)

    def _note(self, event: str, seconds: float, **_: Any) -> None:
        self.compiling += seconds * event.startswith(COMPILING)

    def do_build(self, mode: str, **given: Any) -> dict[str, Any]:
        """Builds a stream, and tells the time to its first batch or its first scan."""
        self._load(mode, given)
        before, start = self.compiling, time.perf_counter()
        self.stream = self.adapter.build(self.program, self.ops)
        batches = self._batches_of_an_epoch()
        batch = wait(next(batches))
        told = {"first": time.perf_counter() - start, "compiling": self.compiling - before}
        for _ in batches:  # to the end: some engines go on from where they are
            pass
        array = next(iter(batch.values()))
        kind = type(array).__module__.partition(".")[0].removesuffix("lib")
        gives = f"{kind} on {device_of(array)}"
        return {"version": self.adapter.version, "gives": gives, **told}

    def do_epochs(self, count: int) -> list[dict[str, Any]]:
        """The time and the content of `count` epochs in a row. Every batch is waited for."""
        runs = [self._epoch() for _ in range(count)]
        told = []
        for seconds, compiling, kept in runs:
            seen = Seen()
            for batch in kept:
                seen.add(batch)
            told.append({"seconds": seconds, "compiling": compiling, **seen.told()})
        return told

    def _epoch(self) -> tuple[float, float, list[Any]]:
        self._rewind()
        kept: list[Any] = []
        before, start = self.compiling, time.perf_counter()
        for batch in self._batches_of_an_epoch():
            kept.append(wait(batch))
        return time.perf_counter() - start, self.compiling - before, kept

    def do_weigh(self, mode: str, small: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """Peak memory of an epoch above that of a small one of the same kind, with the data."""
        for one in (small, given):
            base = peak()
            self._load(mode, one)
            self.stream = self.adapter.build(self.program, self.ops)
            seen = Seen()
            for batch in self._batches_of_an_epoch(CHUNK):
                seen.add(wait(batch))
        size = sum(column.nbytes for column in self.program.columns.values())
        return {"peak": peak() - base, "size": size, **seen.told()}

    def _load(self, mode: str, given: Mapping[str, Any]) -> None:
        given = dict(given)
        with np.load(given.pop("data")) as columns:
            self.program = Program(columns=dict(columns), **given)
        self.mode = mode

    def _batches_of_an_epoch(self, chunk: int = 0) -> Iterator[Any]:
        """The batches of an epoch. A scan gives them stacked, all at once or in chunks."""
        count = len(self.program.columns["id"]) // self.program.batch_size
        if self.mode == "for":
            return iter(self.stream)
        if self.mode == "step":
            return (self.stream.step() for _ in range(count))
        chunk = chunk or count
        return (self.stream.scan(chunk) for _ in range(count // chunk))

    def _rewind(self) -> None:
        # A second loop over some engines is empty until they are told to start again.
        for owner in (self.stream, getattr(self.stream, "pipeline", None)):
            if hasattr(owner, "reset"):
                owner.reset()
                return


class Seen:
    """What an engine has handed out: a digest of every row, in the order in which they came."""

    def __init__(self):
        self.ids = array.array("q")
        self.digests = bytearray()
        self.batches = 0

    def add(self, batch: Mapping[str, Any]) -> None:
        """Adds a batch, or the stacked batches of a scan."""
        fields = {name: np.asarray(batch[name]) for name in sorted(batch)}
        stacked = fields["id"].ndim
        self.batches += fields["id"].size // fields["id"].shape[-1]
        self.ids.extend(fields["id"].ravel().tolist())
        columns = [field.reshape(-1, *field.shape[stacked:]) for field in fields.values()]
        kinds = [f"{n} {x.dtype} {x.shape[1:]}" for n, x in zip(fields, columns, strict=True)]
        for row in zip(*columns, strict=True):
            digest = hashlib.blake2b("; ".join(kinds).encode(), digest_size=SIZE)
            for value in row:
                digest.update(np.ascontiguousarray(value).tobytes())
            self.digests += digest.digest()

    def told(self) -> dict[str, Any]:
        by_id = np.frombuffer(self.digests, f"V{SIZE}")[np.argsort(self.ids, kind="stable")]
        return {
            "batches": self.batches,
            "in_order": hashlib.sha256(self.digests).hexdigest(),
            "by_id": hashlib.sha256(by_id.tobytes()).hexdigest(),
        }


def wait(batch: Any) -> Any:
    """The batch, once it is computed. Only JAX hands out arrays before that."""
    if jax := sys.modules.get("jax"):
        jax.block_until_ready(batch)
    return batch


def device_of(array: Any) -> str:
    """The platform of an array's device, "cpu" if the array names none."""
    device = getattr(array, "device", "cpu")
    return str(getattr(device, "platform", device))


if __name__ == "__main__":
    serve(sys.argv[1], Timer)
