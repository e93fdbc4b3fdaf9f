"""One process of a job: reads its part of an epoch, and prints which records it has read.

`python datarax_reference_job.py PORT PROCESS PROCESSES LENGTH BATCH_SIZE [WHAT]`, two devices each.
What is named is another in each process; then the error is printed, its code and what it names.
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


def main(port, process, processes, length, batch_size, differs=""):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    given = {"seed": 0, "length": length, "batch_size": batch_size}
    if differs:
        given[differs] += 4 * process
    storage = Storage(given["length"])
    source = RandomAccessSource(RandomAccessSourceConfig(shuffle=bool(differs)), storage)
    how = {"batch_size": given["batch_size"], "rngs": nnx.Rngs(given["seed"])}
    try:
        pipeline = Pipeline(source=source, sharding=sharding, **how)
    except ShardingError as error:
        names = re.search("differ in ([a-z_, ]+);", str(error)).group(1)
        return print(json.dumps([error.code, names]))
    for batch in pipeline:
        jax.block_until_ready(batch)
    # Record 0 is looked at for the shapes.
    print(json.dumps(sorted(storage.read - {0})))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:6]), *sys.argv[6:])
