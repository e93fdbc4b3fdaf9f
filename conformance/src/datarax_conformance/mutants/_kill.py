"""Which cases notice a mutant."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from .. import vectors
from ..case import Case, stored_cases
from ..engine import Local
from ..runner import play
from ._mutant import Mutant, adapter_of, module_of

PATIENCE = 5.0  # seconds of CPU time after which a mutant counts as hanging


class Hang(BaseException):
    """Not an Exception, so that no `except Exception` of an engine catches it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises `Hang` after that much CPU time, so a busy machine does not make a mutant hang."""

    def ring(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def noticing(mutant: Mutant, cases: Iterable[Case]) -> Iterator[Case]:
    """The cases that do not pass on a mutant. Each is judged alone, so none is blocked."""
    try:
        with deadline(PATIENCE):
            adapter = adapter_of(mutant)
    except (Hang, Exception):
        yield from cases  # it does not load, so every case fails
        return
    for case in cases:
        if set(case.profiles) <= adapter.capabilities:
            try:
                with deadline(PATIENCE):
                    noticed = play(case, Local(adapter, True), timeout=PATIENCE).outcome != "PASS"
            except (Hang, Exception):
                noticed = True
            if noticed:
                yield case


def misses_vectors(mutant: Mutant) -> bool:
    """Whether the golden vectors notice it. They cover more records than programs can hold."""
    try:
        with deadline(PATIENCE):
            module = module_of(mutant)
            for length in (100, 10**9, 2**32 - 1, 2**40):
                path = pathlib.Path(vectors.__file__).parent / "order" / f"{length}.json"
                for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
                    key = module.epoch_key(module.base_key(case["seed"]), case["epoch"])
                    offsets = case["offsets"] if "offsets" in case else range(length)
                    if module.order(key, length, list(offsets)).tolist() != case["records"]:
                        return True
                    if module.place_of(key, length, case["records"]).tolist() != list(offsets):
                        return True
    except (Hang, Exception):
        return True
    return False


def weight(case: Case) -> int:
    """The largest number of records in a counting column of the case."""
    columns = [case.program["columns"], *(action.get("columns", {}) for action in case.script)]
    return max((column.get("range", 0) for part in columns for column in part.values()), default=0)


@functools.cache
def cases_by_weight() -> tuple[list[Case], list[Case]]:
    """The light cases and the heavy ones, each with the basic cases first."""
    ordered = sorted(stored_cases(), key=lambda case: (not case.basic, case.id))
    return [c for c in ordered if weight(c) <= 5_000], [c for c in ordered if weight(c) > 5_000]
