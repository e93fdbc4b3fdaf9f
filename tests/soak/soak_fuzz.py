"""Damaged files: right rows or a named error; no crash, no hang, no wrong row under a checksum."""

import random
import subprocess
import sys

import cases
import numpy as np
import pytest

from datarax.sources import encode

READER = """
import faulthandler, sys
import numpy as np
faulthandler.dump_traceback_later(60, exit=True)
from datarax.errors import DataraxError
from datarax.sources import *

kind, path = sys.argv[1], sys.argv[2]
for line in sys.stdin:
    path = line.strip()
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        if kind == "npy":
            source = StreamingDiskSource(StreamingDiskSourceConfig(path=path))
        elif kind == "array_record":
            source = ArrayRecordSource(ArrayRecordSourceConfig(paths=path))
        else:
            source = ArrowSource(ArrowSourceConfig(paths=path))
        n = min(len(source), 200)
        rows = source.reader.rows(np.arange(n), source.element_spec)
        ids = np.asarray(rows["data" if kind == "npy" else "id"])
        right = ids.shape == (200,) and bool((ids == np.arange(200)).all())
        print("right" if right else "wrong", flush=True)
    except (DataraxError, ImportError) as error:
        print("named", type(error).__name__, flush=True)
    except BaseException as error:
        print("unnamed", type(error).__name__, str(error)[:200].replace("\\n", " "), flush=True)
"""


def damaged(data: bytes, chance: random.Random) -> bytes:
    how = chance.choice(["flip", "cut", "grow"])
    if how == "cut":
        return data[: chance.randrange(len(data))]
    if how == "grow":
        return data + chance.randbytes(chance.randrange(1, 5000))
    out = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        # Half of the flips into the parts that say what is where.
        end = len(out) if chance.random() < 0.5 else min(len(out), 256)
        out[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(out)


@pytest.mark.spec("SRC-036")
@pytest.mark.parametrize(
    "kind, checksums", [("npy", False), ("array_record", True), ("parquet", True), ("arrow", False)]
)
def test_damaged_files(kind, checksums, tmp_path):
    path = tmp_path / f"good.{kind}"
    if kind == "npy":
        np.save(path, np.arange(200, dtype=np.int32))
    elif kind == "array_record":
        cases.array_record(path, [encode({"id": np.int32(i)}) for i in range(200)])
    elif kind == "parquet":
        cases.parquet(path, n=200, group=50)
    else:
        cases.arrow_file(path, n=200)
    good, chance = path.read_bytes(), random.Random(3)
    (tmp_path / "read.py").write_text(READER)
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(tmp_path / "read.py"), kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    verdicts: dict[str, int] = {}
    for i in range(400):
        one = tmp_path / f"{i}.{kind}"
        one.write_bytes(damaged(good, chance))
        worker.stdin.write(f"{one}\n")
        worker.stdin.flush()
        verdict = worker.stdout.readline().strip()
        assert verdict, f"file {i} killed the process, or hung: {worker.wait()}"
        assert not verdict.startswith("unnamed"), (i, verdict)
        verdicts[verdict.split()[0]] = verdicts.get(verdict.split()[0], 0) + 1
        assert not (checksums and verdict == "wrong"), i
        one.unlink()
    worker.stdin.close()
    worker.stdout.close()
    worker.wait()
    print(f"\n{kind}: {verdicts}")
