"""A file of 4 GB, and what of it stays in memory."""

import subprocess
import sys

import numpy as np
import pytest

ROWS, WIDTH = 4_000_000, 256  # of float32: 4.1 GB

READER = """
import sys, jax
from flax import nnx
from datarax import Pipeline
from datarax.sources import StreamingDiskSource, StreamingDiskSourceConfig

def anonymous():
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0]) // 1024

def pipeline(shuffle):
    config = StreamingDiskSourceConfig(path=sys.argv[1], shuffle=shuffle)
    return Pipeline(
        source=StreamingDiskSource(config), batch_size=4096, rngs=nnx.Rngs(0), last_batch="drop"
    )

jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)))
base = peak = anonymous()
seen = 0
for shuffle in (False, "blocks"):
    for i, batch in enumerate(pipeline(shuffle)):
        seen += len(batch["data"])
        if i % 16 == 0:
            peak = max(peak, anonymous())
        if shuffle and i == 200:
            break
pipeline(False).scan(lambda batch: batch["data"][:, 0].sum(), 400)
print(seen, base, max(peak, anonymous()))
"""


@pytest.mark.spec("SRC-030")
def test_a_file_of_4_gb_takes_less_than_400_mb(tmp_path):
    data = np.lib.format.open_memmap(
        tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(ROWS, WIDTH)
    )
    data[:, 0] = np.arange(ROWS)  # the rest is a hole in the file, which reads as zero
    del data
    (tmp_path / "read.py").write_text(READER)
    out = subprocess.run(
        [sys.executable, str(tmp_path / "read.py"), str(tmp_path / "x.npy")],
        capture_output=True,
        text=True,
        check=True,
    )
    seen, base, peak = map(int, out.stdout.split())
    print(f"\n{seen} rows of {WIDTH * 4} bytes; {base} MB before, at most {peak} MB, map apart")
    assert peak - base < 400
