"""One process of a job: it reads its part of an epoch and prints which records it has read.

It also prints the error for processes whose pipelines differ: its code, and what it names. Run it
as `python datarax_reference_job.py PORT PROCESS PROCESSES LENGTH BATCH_SIZE`. Each process has two
devices.
"""

import json
import re
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datarax import Pipeline
from datarax.errors import ShardingError
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig


class Storage:
    def __init__(self, length):
        self.length, self.read = length, set()

    def __len__(self):
        return self.length

    def __getitem__(self, record):
        self.read.add(int(record))
        return {"id": np.int32(record)}


def differ(process, what, length, batch_size, sharding):
    """The error of a process whose pipeline differs in `what`: its code, and what it names."""
    given = {"seed": 0, "length": length}
    given[what] += process
    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=True), Storage(given["length"]))
    how = {"batch_size": batch_size, "rngs": nnx.Rngs(given["seed"])}
    try:
        Pipeline(source=source, sharding=sharding, **how)
    except ShardingError as error:
        return error.code, re.search("differ in ([a-z_, ]+);", str(error)).group(1)


def main(port, process, processes, length, batch_size):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    told = {x: differ(process, x, length, batch_size, sharding) for x in ("seed", "length")}
    storage = Storage(length)
    source = RandomAccessSource(RandomAccessSourceConfig(), storage)
    for batch in Pipeline(source=source, batch_size=batch_size, sharding=sharding):
        jax.block_until_ready(batch)
    # Every process reads record 0 for the shapes.
    print(json.dumps({"read": sorted(storage.read - {0}), "differ": told}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
