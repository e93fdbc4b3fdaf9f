"""The pytest plugin: `-p datarax_conformance.plugin` with `--adapter module:Class`.

It defines the options since pytest, with `--pyargs`, would read a packaged conftest.py too late.
"""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Iterator

import pytest

from .api import engine_for
from .case import stored_cases
from .files import expected_failures
from .report import make_report, nothing_shown
from .runner import Run


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("datarax-conformance")
    group.addoption("--adapter", help="the engine to check: `module:Class` or `file.py:Class`")
    group.addoption(
        "--expected-failures", type=pathlib.Path, help="JSON list of failures that are known"
    )
    group.addoption("--case-timeout", type=float, default=120.0, help="seconds for a case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conformance_case" in metafunc.fixturenames:
        cases = stored_cases()
        metafunc.parametrize("conformance_case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def conformance_run(request: pytest.FixtureRequest) -> Iterator[Run]:
    config = request.config
    adapter = config.getoption("--adapter")
    if not adapter:
        pytest.exit(
            "The conformance suite needs an engine: --adapter module:Class",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    cases = stored_cases()
    timeout = config.getoption("--case-timeout")
    assert timeout is not None  # it has a default
    listed = config.getoption("--expected-failures")
    try:
        run = Run(
            engine_for(adapter),
            cases,
            expected=expected_failures(listed, cases, datetime.date.today()) if listed else (),
            timeout=timeout,
        )
    except (ValueError, OSError) as error:  # once, not for every case
        pytest.exit(str(error), returncode=2)
    yield run
    run.close()
    verdicts = [done.result() for done in run.verdicts.values() if not done.exception()]
    whole = len(verdicts) == len(cases)  # not with -k, nor in one of the processes of xdist
    if whole and (said := nothing_shown(make_report(run, verdicts, adapter))):
        pytest.fail("\n".join(said), pytrace=False)
