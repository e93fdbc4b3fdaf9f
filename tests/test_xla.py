"""What is compiled apart gives what it would give anyway."""

import os
import platform
import statistics
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax import _order, _xla
from datarax._order import SwapOrNot, keys_of
from datarax._xla import SIDE_BY_SIDE, apart, beside, on_cpu, to_device, transferring
from datarax.sources import _buffers

pytestmark = pytest.mark.internal("XLA compiles for a device, and each has traps of its own")


def outcome(x, y):
    keys = jax.random.split(jax.random.key(3), 2)
    return {"product": x * y, "whole": jnp.int8(7), "keys": keys, "none": None}


def test_it_gives_what_the_function_gives():
    x, y = jnp.arange(3.0), jnp.float32(2)
    for run in (apart, jax.jit(apart, static_argnums=1)):
        found = run(jnp.uint32(5), outcome, x, y)
        assert jax.tree.structure(found) == jax.tree.structure(outcome(x, y))
        assert found["product"].tolist() == [0, 2, 4] and found["whole"] == 7
        assert (
            jax.random.key_data(found["keys"]) == jax.random.key_data(outcome(x, y)["keys"])
        ).all()


@pytest.mark.parametrize("kind", [np.uint32, np.uint8])
def test_every_number_but_the_largest_takes_the_branch(kind):
    def run(number):
        return apart(number, lambda: jnp.int32(1))

    most = np.iinfo(kind).max
    assert [int(run(jnp.asarray(x, kind))) for x in (0, 1, most - 1)] == [1, 1, 1]


def test_gradients_and_maps_go_through():
    def loss(x, number):
        return apart(number, lambda x: (x * x).sum(), x)

    assert jax.grad(loss)(jnp.arange(3.0), jnp.uint32(1)).tolist() == [0, 2, 4]
    mapped = jax.vmap(loss)(jnp.ones((2, 3)), jnp.arange(2, dtype=jnp.uint32))
    assert mapped.tolist() == [3, 3]


def test_on_the_cpu_it_is_a_branch_of_its_own():
    text = (
        jax.jit(lambda n, x: apart(n, jnp.sin, x))
        .lower(jnp.uint32(0), jnp.ones(3))
        .compile()
        .as_text()
    )
    assert " conditional(" in text


def test_the_device_is_the_one_that_was_chosen(monkeypatch):
    assert on_cpu()
    monkeypatch.setattr(_xla.jax, "default_backend", lambda: "gpu")
    assert not on_cpu()
    with jax.default_device(jax.devices("cpu")[0]):
        assert on_cpu()
    with jax.default_device("cpu"):
        assert on_cpu()


@pytest.fixture(params=["shortly", "by device_put"])
def placing(request, monkeypatch):
    """Both ways; the long one as with a JAX whose inner parts are others."""
    if request.param == "by device_put":
        name = "jax._src.interpreters.pxla"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    _xla._put_on_cpu.cache_clear()
    yield
    _xla._put_on_cpu.cache_clear()


@pytest.mark.usefixtures("placing")
@pytest.mark.parametrize(
    "x",
    [
        np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::2],
        np.array(3.0, np.float32),
        np.zeros((0, 3), np.int32),
        np.array([True, False]),
        np.ones(3, jnp.bfloat16),
    ],
    ids=["strided", "scalar", "empty", "bool", "bfloat16"],
)
def test_placed_is_what_device_put_gives(x):
    found, wanted = to_device({"x": x, "placed": jnp.ones(2)})["x"], jax.device_put(x)
    assert isinstance(found, jax.Array) and np.array_equal(found, wanted)
    for name in ("aval", "weak_type", "committed", "sharding"):
        assert getattr(found, name) == getattr(wanted, name)


@pytest.mark.usefixtures("placing")
def test_64_bit_types_are_placed_where_jax_holds_them():
    with jax.enable_x64(True):
        assert to_device(np.ones(3)).dtype == np.float64


def test_an_aligned_array_is_placed_without_a_copy():
    x = _buffers.empty_rows(2**16, (), np.float32)
    assert to_device(x).unsafe_buffer_pointer() == x.ctypes.data


def test_the_short_way_is_open_and_taken_where_nothing_asks_for_more(monkeypatch):
    assert _xla._put_on_cpu(jax.devices()[0]) is not None
    taken = []
    monkeypatch.setattr(_xla, "_put_on_cpu", lambda device: taken.append)
    to_device(np.ones(2, np.float32))
    assert len(taken) == 1
    with jax.default_device(jax.devices("cpu")[0]):
        assert to_device(np.ones(2, np.float32)).tolist() == [1, 1]
    assert len(taken) == 1


@pytest.mark.parametrize("guard", [jax.transfer_guard, jax.transfer_guard_host_to_device])
def test_what_is_transferred_on_purpose_passes_every_guard(guard):
    assert transferring() is transferring()  # nothing to be done where there is none
    with guard("disallow"):
        with transferring():
            assert jnp.asarray(np.ones(2)).tolist() == [1, 1]
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jnp.asarray(np.ones(2))


@pytest.mark.parametrize("cpu", [True, False])
def test_rounds_are_a_loop_on_the_cpu_alone(monkeypatch, cpu):
    monkeypatch.setattr(_order, "on_cpu", lambda: cpu)
    order, offsets = (
        SwapOrNot(keys_of(np.zeros(2, np.uint32), jnp.array([3], jnp.uint32)), 1000),
        jnp.arange(1000),
    )

    def run(offsets):  # traced anew each time
        return order(offsets.astype(jnp.uint32))

    assert (" while(" in jax.jit(run).lower(offsets).compile().as_text()) == cpu
    assert jax.jit(run)(offsets).tolist() == order(offsets.astype(jnp.uint32)).tolist()
    assert sorted(jax.jit(run)(offsets).tolist()) == list(range(1000))


@pytest.mark.skipif(not SIDE_BY_SIDE or (os.cpu_count() or 1) < 2, reason="nothing runs beside")
def test_a_program_does_not_wait_for_one_that_it_is_beside():
    @jax.jit
    def work(turns):
        return jax.lax.fori_loop(0, turns, lambda _, x: jnp.cos(x @ x), jnp.eye(64)).sum()

    jax.block_until_ready(work(1))
    with beside(1):
        long = work(20_000)
    with beside(2):
        short = work(1)
    jax.block_until_ready(short)
    assert not long.is_ready()


FAULTS = """
import resource
import sys
import jax
import numpy as np
from datarax import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig

x = np.ones((9984, 100), np.float32)
pipeline = Pipeline(source=MemorySource(MemorySourceConfig(), {"x": x}), batch_size=256)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(16):
    before = faults()
    # Epochs are kept, and dropped together.
    epochs = [list(pipeline) if sys.argv[1] == "for" else pipeline.scan(dict) for _ in range(3)]
    jax.block_until_ready(epochs)
    del epochs
    print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("mode", ["for", "scan"])
def test_memory_of_batches_is_not_got_anew_page_by_page(mode):
    command = [sys.executable, "-c", FAULTS, mode]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # 12 MB are 3000 pages. Each thread of XLA's that takes a turn has to get some once.
    assert statistics.median(map(int, out.split()[8:])) < 200
