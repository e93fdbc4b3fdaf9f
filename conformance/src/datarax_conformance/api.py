"""Runs the suite from Python. The command line and the pytest plugin use this module, too."""

from __future__ import annotations

import functools
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence

from . import report
from .adapter import Adapter
from .case import Case, stored_cases
from .engine import Engine, Local, Piped, serve_command
from .files import chosen
from .runner import ExpectedFailure, Run


def engine_for(
    adapter: str | Adapter,
    python: str = sys.executable,
    command: Sequence[str] = (),
    shared: str | None = None,
) -> Callable[[], Engine]:
    """A factory of engines. A name or a command runs in another process, an object in this one."""
    if command or isinstance(adapter, str):
        line = command or serve_command(str(adapter), python)
        return functools.partial(Piped, line, shared)
    return functools.partial(Local, adapter)


def run_conformance(
    adapter: str | Adapter,
    *,
    only: Sequence[str] = (),
    cases: Sequence[Case] | None = None,
    expected: Sequence[ExpectedFailure] = (),
    timeout: float = 120.0,
    jobs: int = 1,
    shuffle: int | None = None,
    blocking: bool = True,
    python: str = sys.executable,
    command: Sequence[str] = (),
    replay: str = "",
) -> report.Report:
    """The report on `adapter`, or on a `command` that speaks the protocol.

    `adapter` is an object, `module:Class` or `file.py:Class`. `only` names cases, requirements,
    profiles or JSON files of cases. `shuffle` is the seed of a random order of the cases. `replay`
    is what `datarax-conformance run` takes to run the same engine again, where that does not follow
    from the rest. Raises `AdapterError`, a `ValueError`, if no case can run: the adapter does not
    load, say, or claims no profile.
    """
    asked = chosen(stored_cases() if cases is None else cases, only)
    if shuffle is not None:
        asked = random.Random(shuffle).sample(asked, len(asked))
    with tempfile.TemporaryDirectory(prefix="datarax-conformance-") as shared:
        run = Run(
            engine_for(adapter, python, command, shared),
            asked,
            expected=expected,
            timeout=timeout,
            blocking=blocking,
            in_order=shuffle is not None,
            jobs=jobs if isinstance(adapter, str) else min(jobs, 1),
        )
        try:
            verdicts = run.all()
        finally:
            run.close()
    return report.make_report(run, verdicts, replay or arguments_of(adapter, python, command))


def arguments_of(adapter: str | Adapter, python: str, command: Sequence[str]) -> str:
    """The arguments with which `datarax-conformance run` runs the same engine again."""
    if not isinstance(adapter, str):
        return f"{type(adapter).__module__}:{type(adapter).__qualname__}"
    if command:
        return shlex.join([adapter, "--exec", shlex.join(command)])
    return shlex.join([adapter, *(["--python", python] if python != sys.executable else [])])
