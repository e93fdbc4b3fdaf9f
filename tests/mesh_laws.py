"""Checks of pipelines on a mesh, in one process with several devices or in a process of a job.

`python mesh_laws.py DEVICES [PORT PROCESS PROCESSES]` runs them, and prints "all hold".
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from datarax import Pipeline
from datarax._keys import BaseKey
from datarax.errors import ShardingError
from datarax.sources import (
    EagerSourceBase,
    IterableSource,
    IterableSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
)

LENGTH, SIZE = 27, 8  # the last batch of a loop has 3 rows, which 4 devices cannot share
WIDE = 20_000  # so large that the source shares the array with NumPy
VALUES = np.random.default_rng(0).normal(size=(LENGTH, WIDE)).astype(np.float32)


class Storage:
    def __init__(self, bad=()):
        self.bad, self.read = bad, []

    def __len__(self):
        return LENGTH

    def __getitem__(self, record):
        if record in self.bad:
            raise OSError("broken")
        self.read.append(int(record))
        return {"id": np.int32(record), "x": VALUES[record, :3]}


def memory():
    # In each process the array starts at another offset from the alignment that XLA needs to share.
    place = slice(4 * jax.process_index(), 4 * jax.process_index() + VALUES.size)
    values = np.empty(VALUES.size + 16, np.float32)[place].reshape(VALUES.shape)
    values[...] = VALUES
    fields = {"id": np.arange(LENGTH, dtype=np.int32), "x": values}
    return MemorySource(MemorySourceConfig(shuffle=True), fields)


def held_in_parts():
    parts = NamedSharding(mesh(), PartitionSpec("data"))
    rows = VALUES[:24, :3]
    whole = jax.make_array_from_callback(rows.shape, parts, lambda index: rows[index])
    return MemorySource(MemorySourceConfig(), {"x": whole})


def storage():
    return RandomAccessSource(RandomAccessSourceConfig(shuffle=True), Storage())


def damaged():
    config = RandomAccessSourceConfig(on_error="mask", max_errors=2)
    return RandomAccessSource(config, Storage(bad=(3, 20)))


def stream():
    return IterableSource(IterableSourceConfig(), [{"x": row} for row in VALUES[:, :3]])


def draws(batch, *, keys):
    drawn = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys)
    return {**batch, "drawn": drawn}


class Mixes(nnx.Module):
    """A stage that uses all rows, and counts batches."""

    def __init__(self):
        self.seen = nnx.Variable(jnp.int32(0))

    def __call__(self, batch):
        self.seen[...] += 1
        x = batch["x"][:, :3]
        return {**batch, "less": x - x.mean(0, keepdims=True), "count": x * 0 + self.seen[...]}


class Holds(nnx.Module):
    """A stage that keeps rows as its state. Each process then has a part of them."""

    def __init__(self):
        self.last = nnx.Variable(jnp.zeros((SIZE, 3)))

    def __call__(self, batch):
        before = self.last[...]
        self.last[...] = batch["x"]
        return {**batch, "before": before}


CASES = {
    "memory": (memory, [draws, Mixes], "keep"),
    "held in parts": (held_in_parts, [draws], "drop"),
    "counted": (memory, [Mixes], "drop"),
    "storage": (storage, [draws, Mixes], "keep"),
    "storage alone": (storage, [], "keep"),
    "damaged": (damaged, [], "pad"),
    "padded": (storage, [], "pad"),
    "held rows": (storage, [Holds], "drop"),
    "stream": (stream, [Mixes], "pad"),
}
MODES = {
    "for": lambda pipeline: [batch for _ in range(2) for batch in pipeline],
    "step": lambda pipeline: [pipeline.step() for _ in range(5)],
    "scan": lambda pipeline: [pipeline.scan(dict, 6)],
}


# The modes of each case. Each compiles for a second or more.
IN_A_PROCESS = {
    "memory": "for step scan",
    "held in parts": "for",
    "storage": "for scan",
    "storage alone": "for step",
    "damaged": "scan",
    "stream": "scan",
}
IN_A_JOB = {
    "memory": "for",
    "storage": "scan",
    "storage alone": "for",
    "padded": "for",  # the second process has only padding in the last batch
    "stream": "for",
}


def mesh():
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def by_rows():
    return NamedSharding(mesh(), PartitionSpec("data"))


def build(case, sharding):
    source, stages, last_batch = CASES[case]
    stages = [stage() if isinstance(stage, type) else stage for stage in stages]
    how = {"batch_size": SIZE, "last_batch": last_batch, "rngs": nnx.Rngs(0)}
    return Pipeline(source=source(), stages=stages, sharding=sharding, **how)


def whole(x):
    """The whole of an array, also if other processes have parts of it."""
    alone = x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(x if alone else process_allgather(x, tiled=True))


def check_batches(case, mode):
    """Batches and state equal those without a sharding, and the batches are sharded as asked."""
    sharding = by_rows()
    alone, split = build(case, None), build(case, sharding)
    for expected, found in zip(MODES[mode](alone), MODES[mode](split), strict=True):
        assert expected.keys() == found.keys()
        for name, x in found.items():
            assert (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype)
            values, wanted = whole(x), whole(expected[name])
            if name == "less":  # a mean, which the devices may round otherwise
                np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)
            else:
                np.testing.assert_array_equal(values, wanted, err_msg=f"{case} {mode} {name}")
            if mode != "scan":
                evenly = len(x) % jax.device_count() == 0
                lies = sharding if evenly else NamedSharding(mesh(), PartitionSpec())
                assert x.sharding.is_equivalent_to(lies, x.ndim), (case, mode, name, x.sharding)
    assert alone.get_state() == split.get_state()
    assert alone.cursor == split.cursor


def check_state():
    """A state that was saved on a mesh can be restored on a mesh and without one."""
    first = build("held rows", by_rows())
    first.step()
    state = json.dumps(first.get_state())
    expected = whole(first.step()["before"])
    for sharding in by_rows(), None:
        resumed = build("held rows", sharding)
        resumed.set_state(state)
        np.testing.assert_array_equal(whole(resumed.step()["before"]), expected)
        resumed.set_state(state)  # now it replaces a state in parts
        np.testing.assert_array_equal(whole(resumed.step()["before"]), expected)


def check_scan_trains():
    """Training in a scan gives the same with the rows spread over the devices as on one device."""

    def train(model, batch):
        def loss_of(model):
            return ((batch["x"][:, :3] @ model.kernel[...] - 1) ** 2).mean()

        loss, slopes = nnx.value_and_grad(loss_of)(model)
        model.kernel[...] -= 0.1 * slopes.kernel[...]
        return loss

    losses = []
    for sharding in None, by_rows():
        model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(1))
        losses.append(whole(build("memory", sharding).scan(train, 6, modules=(model,))))
    np.testing.assert_allclose(*losses, rtol=1e-5)


def check_reads():
    """A process reads only the rows of a split batch that its own devices hold."""
    storage = Storage()
    source = RandomAccessSource(RandomAccessSourceConfig(), storage)
    pipeline = Pipeline(source=source, batch_size=SIZE, last_batch="drop", sharding=by_rows())
    storage.read.clear()  # what it read for the shapes
    pipeline.scan(dict, 3)
    share, place = SIZE // jax.process_count(), jax.process_index()
    own = [x for x in range(24) if x % SIZE // share == place]
    # Two chunks may be read at the same time, so the order is open.
    assert sorted(storage.read) == own, (storage.read, own)


def check_data_lie_on_the_mesh():
    """Each device has one copy of the rows, made once. The copy leaves out what NumPy has in memory
    in front of them, which differs from process to process."""
    pipeline = build("memory", by_rows())
    held = pipeline.source.data.get("x").data
    first = held.get_raw_value()
    pipeline.step()
    pipeline.nodes["draws"] = draws  # makes the pipeline check itself again
    pipeline.step()
    assert held.get_raw_value() is first
    assert first.shape == VALUES.shape
    assert first.sharding.device_set == set(jax.devices())


def check_one_source_serves_several():
    """A source serves pipelines over several meshes and without one, and stays as it was."""
    source = memory()
    for devices in jax.devices(), jax.devices()[2:3]:
        grid = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(grid, PartitionSpec("data"))
        how = {"source": source, "batch_size": SIZE, "rngs": nnx.Rngs(0)}
        for one, where in ((sharding, devices), (None, jax.devices()[:1])):
            batch = Pipeline(**how, sharding=one).step()
            assert batch["x"].sharding.device_set == set(where)


class Plain(EagerSourceBase):
    """A source that a user may write."""

    def __init__(self):
        super().__init__(shuffle="permutation")
        self.x = jnp.asarray(VALUES[:, :3])

    def __len__(self):
        return LENGTH

    def gather(self, records):
        return {"x": self.x[records]}


class Scale(nnx.Module):
    def __init__(self):
        self.by = nnx.Param(jax.device_put(jnp.float32(2), jax.devices()[1]))
        self.weak = nnx.Variable({"one": jnp.asarray(1.0)})
        self.rngs = nnx.Rngs(0)

    def __call__(self, batch):
        draw = jax.random.bits(self.rngs.default(), (len(batch["x"]),))
        half = batch["x"].astype(jnp.bfloat16) * self.weak["one"]
        return {"x": batch["x"] * self.by[...], "draw": draw, "half": half}


def check_nothing_is_copied_for_every_batch():
    """A pipeline moves the arrays that it holds to the mesh, from any device, and uses them there.
    The user can still change them."""
    stage = Scale()
    how = {"stages": [stage], "batch_size": SIZE, "rngs": nnx.Rngs(0)}
    alone = Pipeline(source=Plain(), **how | {"stages": [Scale()]})
    pipeline = Pipeline(source=Plain(), sharding=by_rows(), **how)
    with jax.transfer_guard_device_to_device("disallow"), jax.transfer_guard("disallow"):
        batches = [(pipeline.step(), alone.step()) for _ in range(5)]
    for found, expected in batches:
        for name in "x", "draw", "half":
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(whole(found[name]), whole(expected[name]))
    orders = [order for _, order in pipeline._runtime._orders._known.values()]
    held = pipeline.source.x, stage.by.get_raw_value(), *jax.tree.leaves(orders)
    assert all(x.sharding.device_set == set(jax.devices()) for x in held)
    stage.by[...] = jnp.float32(3)
    np.testing.assert_array_equal(whole(pipeline.step()["x"]) * 2, whole(alone.step()["x"]) * 3)


def check_a_sharding_may_change():
    """A sharding may change to fewer devices, to others, to another order of them, and to none."""
    alone, moved = build("counted", None), build("counted", by_rows())
    state = moved.get_state()
    for devices in jax.devices()[::-1], jax.devices()[2:]:
        grid = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
        moved.sharding = NamedSharding(grid, PartitionSpec("data"))
        for _ in range(2):
            found, expected = moved.step(), alone.step()
            np.testing.assert_array_equal(whole(found["count"]), whole(expected["count"]))
            np.testing.assert_array_equal(whole(found["x"]), whole(expected["x"]))
            assert found["x"].sharding.device_set == set(devices)
    moved.sharding = None
    moved.set_state(state)
    alone.reset()
    alone.nodes["Mixes"].seen[...] = 0
    np.testing.assert_array_equal(whole(moved.step()["count"]), whole(alone.step()["count"]))


def check_a_value_may_be_given_on_one_device():
    """A pipeline takes values, the cursor included, on one device, as from a checkpoint that was
    restored elsewhere."""
    alone, moved = build("counted", None), build("counted", by_rows())
    for pipeline in (alone, moved):
        pipeline.step()
        state = nnx.state(pipeline, nnx.Not(BaseKey))
        here = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), state)
        nnx.update(pipeline, here)
    for _ in range(2):
        found, expected = moved.step(), alone.step()
        np.testing.assert_array_equal(whole(found["count"]), whole(expected["count"]))
        np.testing.assert_array_equal(whole(found["x"]), whole(expected["x"]))


def check_the_default_device_of_a_thread():
    """Reading threads put rows on the default device of the thread that asks. The rows here are so
    large that the reading threads do it."""
    records = [{"x": np.full(100_000, i, np.float32)} for i in range(12)]
    pipeline = Pipeline(
        source=RandomAccessSource(RandomAccessSourceConfig(), records), batch_size=2
    )
    for device in jax.devices()[1], jax.devices()[2]:
        with jax.default_device(device):
            batches = [pipeline.step() for _ in range(3)] + [*pipeline]
        assert [x["x"].device for x in batches] == [device] * 6


def check_what_a_scan_is_given_lies_on_the_mesh():
    grid = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(grid, PartitionSpec("data"))
    source = MemorySource(MemorySourceConfig(), {"x": VALUES[:, :3]})
    pipeline = Pipeline(source=source, batch_size=SIZE, sharding=sharding)
    alone = jax.device_put(jnp.float32(0), jax.devices()[3])

    def add(carry, model, batch):
        return carry + batch["x"].sum() + model.bias[...].sum(), None

    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    for carry, name in ((alone, "init_carry"), ([alone], "init_carry[0]")):
        text = re.escape(f"is over the devices 0, 1, but `{name}` was put on 3: put it on the mesh")
        with pytest.raises(ShardingError, match=text):
            pipeline.scan(lambda carry, batch: (carry, batch["x"]), 1, init_carry=carry)
    model.bias.set_raw_value(jax.device_put(model.bias[...], jax.devices()[3]))
    with pytest.raises(ShardingError, match=r"but `modules\[0\]\.bias` was put on 3: put it"):
        pipeline.scan(add, 1, modules=(model,), init_carry=jnp.float32(0))
    everywhere = NamedSharding(grid, PartitionSpec())
    model.bias.set_raw_value(jax.device_put(model.bias[...], everywhere))
    pipeline.scan(add, 1, modules=(model,), init_carry=jnp.float32(0))
    assert pipeline.cursor == (0, SIZE)


def check_data_on_other_devices_are_refused():
    grid = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(grid, PartitionSpec("data"))
    text = r"the devices 0, 1, but an array of shape \(24, 3\) that the pipeline holds is split"
    with pytest.raises(ShardingError, match=text):
        Pipeline(source=held_in_parts(), batch_size=SIZE, sharding=sharding)


def refused(differs, **settings):
    """The text with which a pipeline is refused whose processes differ in what is named. It is
    refused in every process, since all would get wrong batches."""
    source = MemorySource(MemorySourceConfig(shuffle=True), VALUES[:, :3])
    text = f"over the same data, but they differ in {differs}; this one has"
    with pytest.raises(ShardingError, match=text) as caught:
        Pipeline(source=source, batch_size=SIZE, sharding=by_rows(), **settings)
    return str(caught.value)


def check_processes_that_differ():
    number = jax.process_index()
    refused("seed", rngs=nnx.Rngs(number))
    refused("mask_name", rngs=nnx.Rngs(0), last_batch="pad", mask_name=f"mask{number}")
    nodes = {"nodes": {f"n{number}": dict}, "edges": {f"n{number}": []}, "sink": f"n{number}"}
    text = refused("graph", rngs=nnx.Rngs(0), **nodes)  # not the seed, which is the same
    assert text.endswith(f"; here they are n{number} (type) of source.")


def check_nothing_is_ahead():
    """A job computes no batches ahead: how many depends on the clock, and so differs by process."""
    pipeline = build("memory", by_rows())
    for _ in range(4):
        for _ in pipeline:
            assert not pipeline._runtime._computed.ready


def main(devices, port=0, process=0, processes=1):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, process)
        check_nothing_is_ahead()
        check_processes_that_differ()
    else:
        check_one_source_serves_several()
        check_data_on_other_devices_are_refused()
        check_what_a_scan_is_given_lies_on_the_mesh()
        check_nothing_is_copied_for_every_batch()
        check_a_sharding_may_change()
        check_a_value_may_be_given_on_one_device()
        check_the_default_device_of_a_thread()
    for case, modes in (IN_A_JOB if processes > 1 else IN_A_PROCESS).items():
        for mode in modes.split():
            check_batches(case, mode)
    check_state()
    check_data_lie_on_the_mesh()
    check_scan_trains()
    check_reads()
    print("all hold")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
