"""The pytest plugin of the benchmarks: fixtures, and the description of the machine in the JSON."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import cpuinfo
import jax
import pytest
from benchmarks.harness import Estimate, Side, in_turn


def pytest_addoption(parser: pytest.Parser):
    parser.addoption("--seconds", type=float, default=1.0, help="about how long to time a row")


def machine() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    device = jax.devices()[0]
    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.machine()),
        "cores": os.cpu_count(),
        "platform": device.platform,
        "device": device.device_kind,
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
    }


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine()  # the default would also publish the name of the host


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return {}


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # Keep only what the pages need: with every single time, the file would be 100 times as large.
    for benchmark in output_json["benchmarks"]:
        del benchmark["stats"]["data"], benchmark["options"]


@pytest.fixture
def row(benchmark: Any) -> Callable[..., None]:
    """Notes a row of the report: the figure, its unit, its budget and any other values."""

    def note(found: Estimate, *, unit: str = "x", budget: float | None = None, **more: Any):
        benchmark.extra_info.update(
            found=found._asdict(),
            unit=unit,
            budget=budget,
            **{k: v._asdict() if isinstance(v, Estimate) else v for k, v in more.items()},
        )

    return note


@pytest.fixture
def compare(benchmark: Any, row: Callable[..., None], request: pytest.FixtureRequest):
    """Times two sides in turn and notes their ratio."""

    def run(ours: Side, floor: Side, **more: Any) -> None:
        times = in_turn(benchmark, ours, floor, request.config.getoption("--seconds"))
        row(times["ratio"], **(times | more))

    return run
