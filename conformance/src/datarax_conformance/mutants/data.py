"""Faulty stored values: with any one changed, the case must fail on a correct engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from ..case import Case
from ..casebook import Recorder
from ..compare import deviation
from ..model_adapter import Adapter
from ..runner import play
from ._kill import cases_by_weight


def flipped(value: Any) -> Any:
    """Another value of the same kind, or None for a value of no known kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + "~" if isinstance(value, str) else None


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from leaves(part, (*path, name))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from leaves(part, (*path, number))
    else:
        yield path


def with_flip(value: Any, path: tuple[Any, ...]) -> Any:
    new = copy.deepcopy(value)
    part = new
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = flipped(part[path[-1]])
    return new


def answers_of(case: Case) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """The expectation of each action, with the model's answer and the notes at that time."""
    recorder = Recorder(Adapter())
    assert play(case, recorder, timeout=600).outcome == "PASS"
    found, notes, answers = [], {}, iter(recorder.answers)
    for action in case.script:
        if action["do"] == "restart":
            continue
        answer = next(answers)
        if "expect" in action:
            found.append((action["expect"], answer, dict(notes)))
        if "note" in action:
            notes[action["note"]] = answer["value"]
    return found


def red(expect: Any, answer: Any, notes: Any) -> bool:
    try:
        return deviation(expect, answer, notes) is not None
    except (KeyError, TypeError, ValueError):
        return True  # a check that does not exist, a note that was never taken


def open_ended(path: tuple[Any, ...], expect: Any) -> bool:
    """Whether changing this value may leave the verdict as it is: a bound, or one alternative."""
    return (
        "any" in path
        or path[-1] in ("low", "high", "within", "steps", "most")
        or "least" in path
        or (path[-1] == "like" and "all" in path)
    )


def check() -> tuple[int, int, list[str]]:
    """The number of stored values, the number that count, and a text for each of the others."""
    total, faults = 0, []
    for case in cases_by_weight()[0]:
        for expect, answer, notes in answers_of(case):
            for path in leaves(expect):
                if not path or open_ended(path, expect):
                    continue
                total += 1
                if not red(with_flip(expect, path), answer, notes):
                    faults.append(f"{case.id}: {'.'.join(map(str, path))} is read by nobody")
    return total, total - len(faults), faults
