"""`to_device` gives what `device_put` gives, and freed memory is kept for the next batches."""

import platform
import statistics
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax import _host_memory
from datarax._host_memory import to_device
from datarax.sources import _buffers

pytestmark = pytest.mark.internal("where values lie changes none of them")


@pytest.fixture(params=["directly", "by device_put"])
def placing(request, monkeypatch):
    """Both ways; the second as with a JAX that lacks the private function."""
    if request.param == "by device_put":
        name = "jaxlib.xla_client"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    _host_memory._put_on_cpu.cache_clear()
    direct = _host_memory._put_on_cpu(jax.local_devices()[0]) is not None
    assert direct == (request.param == "directly")
    yield
    _host_memory._put_on_cpu.cache_clear()


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


@pytest.mark.usefixtures("placing")
def test_placing_is_allowed_under_any_transfer_guard():
    _host_memory._put_on_cpu.cache_clear()  # the first call has something to find out
    with jax.transfer_guard("disallow_explicit"):
        placed = to_device(np.ones(3, np.float32))
    assert placed.tolist() == [1, 1, 1]


def test_an_aligned_array_is_placed_without_a_copy():
    x = _buffers.empty_rows(2**16, (), np.float32)
    assert to_device(x).unsafe_buffer_pointer() == x.ctypes.data


def test_the_short_way_is_open_and_taken_where_nothing_asks_for_more(monkeypatch):
    assert _host_memory._put_on_cpu(jax.devices()[0]) is not None
    taken = []
    monkeypatch.setattr(_host_memory, "_put_on_cpu", lambda device: taken.append)
    to_device(np.ones(2, np.float32))
    assert len(taken) == 1
    with jax.default_device(jax.devices("cpu")[0]):
        assert to_device(np.ones(2, np.float32)).tolist() == [1, 1]
    assert len(taken) == 1


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
    # 12 MB are 3000 pages. Each thread of XLA has to get its memory once.
    assert statistics.median(map(int, out.split()[8:])) < 200
