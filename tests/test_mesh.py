"""How batches lie on the devices of a mesh (spec MESH)."""

import copy
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import mesh_laws
import numpy as np
import pytest
from flax import nnx
from helpers import pipeline, sharding_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from datarax import Pipeline
from datarax.errors import ShardingError
from datarax.sources import RandomAccessSource, RandomAccessSourceConfig

LAWS = str(Path(mesh_laws.__file__))


def finished(*jobs):
    """Waits until all processes have succeeded. If one fails, the others would wait forever."""
    try:
        for job in jobs:
            out, err = job.communicate(timeout=400)
            assert out.endswith("all hold\n"), err[-3000:]
    finally:
        for job in jobs:
            job.kill()


def started(*words):
    command = [sys.executable, LAWS, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.spec("MESH-001", "MESH-002", "MESH-005")
def test_four_devices_get_the_batches_of_one():
    finished(started(4))


@pytest.mark.spec("MESH-001", "MESH-002", "MESH-003", "MESH-005", "MESH-006")
def test_two_processes_get_the_batches_of_one_and_read_half_of_them_each():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finished(*[started(2, port, process, 2) for process in range(2)])


@pytest.mark.spec("MESH-004")
@pytest.mark.parametrize(
    "sharding, text",
    [
        (sharding_of(PartitionSpec.UNCONSTRAINED), "must split the rows of a batch, axis 0, and"),
        (
            NamedSharding(sharding_of().mesh.abstract_mesh, PartitionSpec("data")),
            "needs a mesh of devices, got",
        ),
        (
            sharding_of("data").with_memory_kind("pinned_host"),
            "can only be over memory of the kind 'device', got NamedSharding",
        ),
        (
            sharding_of(("data", "model"), data=2, model=3),
            "splits a batch into 6 equal parts, but a `batch_size` of 8, which counts the rows",
        ),
    ],
)
def test_what_does_not_split_rows_is_refused(sharding, text):
    with pytest.raises(ShardingError, match=text):
        pipeline(length=8, batch_size=8, sharding=sharding)


@pytest.mark.spec("MESH-001")
@pytest.mark.parametrize(
    "sharding",
    [
        sharding_of("data"),
        sharding_of(),
        sharding_of(("data", "model"), data=1, model=1),
        sharding_of("data", None),
    ],
    ids=str,
)
def test_shardings_of_rows_are_taken(sharding):
    alone = pipeline(length=10, batch_size=4, seed=0)
    split = pipeline(length=10, batch_size=4, seed=0, sharding=sharding)
    for expected, found in zip(alone, split, strict=True):
        assert found["id"].tolist() == expected["id"].tolist()
        assert found["id"].sharding.mesh == sharding.mesh


@pytest.mark.spec("MESH-001", "STEP-016")
def test_it_is_traced_as_any_pipeline():
    alone, split = (
        pipeline(length=10, batch_size=4, seed=0, sharding=x) for x in (None, sharding_of("data"))
    )
    for _ in range(3):
        found = nnx.jit(lambda pipeline: pipeline.step())(split)
        assert found["id"].tolist() == alone.step()["id"].tolist()
    assert split.replay(3)["source"]["id"].tolist() == [3]


@pytest.mark.spec("MESH-005")
def test_a_pickle_knows_no_devices_and_a_copy_does():
    split = pipeline(length=10, batch_size=4, seed=0, sharding=sharding_of("data"))
    split.step()
    loaded = pickle.loads(pickle.dumps(split))
    copies = copy.deepcopy(split), nnx.clone(split), copy.copy(split)
    assert loaded.sharding is None
    assert all(x.sharding == split.sharding for x in copies)
    ids = split.step()["id"].tolist()
    assert all(x.step()["id"].tolist() == ids for x in (loaded, *copies[:2]))


@pytest.mark.spec("MESH-002")
def test_a_sharding_may_be_given_later():
    stream = pipeline(length=12, batch_size=4)
    stream.step()
    stream.sharding = sharding_of("data")
    assert stream.step()["id"].sharding.is_equivalent_to(stream.sharding, 1)
    stream.sharding = sharding_of("data", kind=AxisType.Explicit)
    with pytest.raises(ShardingError):
        stream.step()
    stream.sharding = None
    assert stream.step()["id"].tolist() == [8, 9, 10, 11]


@pytest.mark.spec("MESH-004")
def test_a_mesh_with_explicit_axes_that_is_set_meanwhile_is_refused():
    explicit = sharding_of("data", kind=AxisType.Explicit)
    split, alone = (pipeline(length=12, batch_size=4, sharding=x) for x in (sharding_of(), None))
    split.step()
    read = RandomAccessSource(RandomAccessSourceConfig(), [{"id": np.int32(i)} for i in range(12)])
    bare = Pipeline(source=read, batch_size=4, sharding=sharding_of())
    with jax.set_mesh(explicit.mesh):
        for use in (
            split.step,
            lambda: next(iter(split)),
            lambda: split.scan(lambda batch: batch["id"], 2),
            lambda: pipeline(length=12, batch_size=4, sharding=sharding_of()),
            lambda: Pipeline(source=read, stages=[dict], batch_size=4, sharding=sharding_of()),
        ):
            with pytest.raises(ShardingError, match=r"`jax\.set_mesh` has set one with Explicit"):
                use()
        for given in (alone, bare):  # which is read on the host, and needs no program
            assert [x["id"].tolist() for x in given] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert split.step()["id"].tolist() == [4, 5, 6, 7]


@pytest.mark.spec("MESH-002")
def test_it_is_shown_how_batches_lie():
    split = pipeline(length=12, batch_size=4, sharding=sharding_of("data"))
    assert f"cursor=(0, 0), {PartitionSpec('data')} over 1 devices\n" in str(split)
    assert "devices" not in str(pipeline(length=12, batch_size=4))
