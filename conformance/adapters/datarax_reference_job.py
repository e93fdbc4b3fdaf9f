"""One process of a job: reads its part of an epoch, and prints which records it has read.

`python datarax_reference_job.py PORT PROCESS PROCESSES LENGTH BATCH_SIZE`, two devices each.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datarax import Pipeline
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig


class Storage:
    def __init__(self, length):
        self.length, self.read = length, set()

    def __len__(self):
        return self.length

    def __getitem__(self, record):
        self.read.add(int(record))
        return {"id": np.int32(record)}


def main(port, process, processes, length, batch_size):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    storage = Storage(length)
    source = RandomAccessSource(RandomAccessSourceConfig(), storage)
    for batch in Pipeline(source=source, batch_size=batch_size, sharding=sharding):
        jax.block_until_ready(batch)
    # Record 0 is looked at for the shapes.
    print(json.dumps(sorted(storage.read - {0})))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
