"""Killed at a random moment, fifty times, and resumed: every record once an epoch, in order."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from flax import nnx

from datarax import Pipeline
from datarax.sources import StreamingDiskSource, StreamingDiskSourceConfig

N, BATCH, KILLS = 20_000, 64, 50

WORKER = """
import os, sys
import numpy as np
from flax import nnx
from datarax import Pipeline
from datarax.sources import StreamingDiskSource, StreamingDiskSourceConfig

folder = sys.argv[1]
config = StreamingDiskSourceConfig(path=folder + "/id.npy", shuffle=True)
pipeline = Pipeline(source=StreamingDiskSource(config), batch_size=BATCH, rngs=nnx.Rngs(11))
# A line of the log is a batch and the state after it, written in one call: whole or not there.
log = os.open(folder + "/log", os.O_RDWR | os.O_CREAT)
text = os.read(log, 1 << 30).decode()
whole = text[: text.rfind("\\n") + 1]
os.ftruncate(log, len(whole))
os.lseek(log, len(whole), os.SEEK_SET)
if whole:
    pipeline.set_state(whole.splitlines()[-1].split("\\t")[1])
import json
ready = False
while True:
    for batch in pipeline:
        ids = ",".join(map(str, np.asarray(batch["data"]).tolist()))
        os.write(log, f"{ids}\\t{json.dumps(pipeline.get_state())}\\n".encode())
        if not ready:
            ready = True
            print("ready", flush=True)
"""


@pytest.mark.spec("SRC-030", "SRC-019")
def test_fifty_kills_lose_and_repeat_nothing(tmp_path):
    np.save(tmp_path / "id.npy", np.arange(N, dtype=np.int32))
    script = tmp_path / "worker.py"
    script.write_text(f"BATCH = {BATCH}\n" + WORKER)
    chance, ended = random.Random(5), []
    for _ in range(KILLS):
        worker = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.5))
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        ended.append(os.path.getsize(tmp_path / "log") if (tmp_path / "log").exists() else 0)

    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    lines = [line.split("\t")[0] for line in lines if line.endswith("\n")]
    seen = np.array([int(i) for line in lines for i in line.split(",")])
    config = StreamingDiskSourceConfig(path=tmp_path / "id.npy", shuffle=True)
    undisturbed = Pipeline(source=StreamingDiskSource(config), batch_size=BATCH, rngs=nnx.Rngs(11))
    expected = []
    while len(expected) < len(seen):
        expected += [i for batch in undisturbed for i in np.asarray(batch["data"]).tolist()]
    np.testing.assert_array_equal(seen, expected[: len(seen)])
    assert len(lines) > KILLS and len(set(ended)) > KILLS // 2
    print(
        f"\n{KILLS} kills, {len(lines)} batches, {len(seen) / N:.2f} epochs, "
        f"{len(set(ended))} different places in the log"
    )
