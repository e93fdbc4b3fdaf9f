"""Reads the files that users write.

What is wrong with one is a `ValueError` of one line that names the file.
"""

from __future__ import annotations

import datetime
import inspect
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .adapter import PROFILES
from .arrays import decode
from .case import Case, selected
from .compare import CHECKS
from .report import Report, to_html
from .requirements import requirements
from .runner import ExpectedFailure
from .session import Session

KINDS = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}

CASE = {"id": str, "title": str, "cites": list, "needs": list, "profiles": list, "basic": bool}
CASE |= {"program": dict, "script": list}
# Values of a program may be wrong: that is what a case may be about.
PROGRAM = {"columns": dict, "batch_size": object, "last_batch": object, "seed": object}
PROGRAM |= {"nodes": dict, "edges": object, "sink": object}
REPORT = {"suite": str, "spec": str, "engine": dict, "summary": dict, "profiles": dict}
REPORT |= {"digest": str, "verdicts": list}
FAILURE = {"case": str, "reason": str, "link": str, "expires": str}

NOT_SENT = ("do", "expect", "note", "part")


def read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{path} is no JSON: {exc}") from exc


def misshapen(
    data: Any, fields: Mapping[str, type], what: str, more: Sequence[str] = ()
) -> str | None:
    """Why `data` is not an object of these fields, and of some of `more`, or None."""
    if not isinstance(data, dict):
        return f"{what} is an object, got {json.dumps(data)[:60]}"
    if missing := [name for name in fields if name not in data]:
        return f"{what} lacks {', '.join(map(repr, missing))}"
    if unknown := sorted(data.keys() - fields.keys() - {*more}):
        return f"{what} has no {unknown[0]!r}, but {', '.join(map(repr, [*fields, *more]))}"
    wrong = (name for name, kind in fields.items() if not isinstance(data[name], kind))
    if name := next(wrong, None):
        return f"{name!r} of {what} is {KINDS[fields[name]]}, got {json.dumps(data[name])[:60]}"
    return None


def load_own(path: pathlib.Path) -> Case:
    """The case in a file of the user's."""
    data = read(path)
    if fault := misshapen(data, CASE, "a case") or next(case_faults(data), None):
        raise ValueError(f"{path} is no case: {fault}.")
    return Case.from_json({**data, "file": str(path)})


def chosen(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """All cases, or those that are named, by id, requirement, profile or JSON file.

    The case in a file replaces that of the same id.
    """
    if isinstance(names, str):
        raise ValueError(f"The names of cases are a list, got {names!r}.")
    files = [name for name in names if name.endswith(".json")]
    others = [name for name in names if name not in files]
    found = selected(cases, others) if others or not files else []
    own = [load_own(pathlib.Path(name)) for name in files]
    return [*{case.id: case for case in [*found, *own]}.values()]


def case_faults(data: Mapping[str, Any]) -> Iterator[str]:
    if not re.fullmatch(r"\w[\w.-]*", data["id"]):  # a report makes the name of a file of it
        yield f"the id {data['id']!r} has other characters than letters, digits, '-', '_' and '.'"
    yield from (f"{name!r} is empty" for name in ("cites", "profiles", "script") if not data[name])
    for cite in data["cites"]:
        if not re.fullmatch(r"[A-Z]+-\d+@\d+", str(cite)):
            yield f"a citation is like 'ITER-004@1', got {cite!r}"
    for name in [*(str(cite).partition("@")[0] for cite in data["cites"]), *data["needs"]]:
        if name not in [*requirements()]:
            yield f"there is no requirement {name!r}"
    for name in data["profiles"]:
        if name not in PROFILES:
            yield f"there is no profile {name!r}, but {', '.join(PROFILES)}"
    fault = misshapen(data["program"], PROGRAM, "a program", ["options"])
    yield from [fault] if fault else program_faults(data["program"])
    known: set[str] = set()  # names of answers so far
    for number, action in enumerate(data["script"], 1):
        for fault in action_faults(action, known):
            yield f"action {number}: {fault}"
        known |= {str(action.get("note", action["to"] if action["do"] == "save" else ""))}


def program_faults(program: Mapping[str, Any]) -> Iterator[str]:
    for name, form in program["nodes"].items():
        if not isinstance(form, str):
            yield f"the operation of the node {name!r} is a text, got {json.dumps(form)[:60]}"
    if not isinstance(program.get("options", {}), dict):
        yield f"'options' of a program is an object, got {json.dumps(program['options'])[:60]}"
    yield from columns_faults(program["columns"])


def columns_faults(columns: Mapping[str, Any]) -> Iterator[str]:
    for name, column in columns.items():
        try:
            decode(column)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            yield f"the column {name!r} cannot be read: {type(exc).__name__}: {exc}"


def action_faults(action: Any, known: set[str]) -> Iterator[str]:
    if not isinstance(action, dict) or not isinstance(action.get("do"), str):
        yield f"an action has a 'do', got {json.dumps(action)[:60]}"
        return
    do = action["do"]
    given = {name: value for name, value in action.items() if name not in NOT_SENT}
    method = Session.do_reset if do == "restart" else getattr(Session, f"do_{do}", None)
    if method is None:
        yield f"there is no action {do!r}"
        return
    if fault := unbound(method, given):
        yield f"{do!r}: {fault}"
    if do == "build":
        changes = given.keys() - {"to"} - PROGRAM.keys() - {"options"}
        yield from (f"a program has no {name!r}" for name in sorted(changes))
        yield from columns_faults(given.get("columns", {}))
    if do == "restore" and str(given.get("origin")) not in known:
        yield f"no state is called {given.get('origin')!r} so far"
    if "expect" in action:
        yield from expect_faults(action["expect"], known)


def unbound(function: Any, arguments: Mapping[str, Any]) -> str | None:
    """Why the function does not take these arguments after its first, or None."""
    try:
        inspect.signature(function).bind(None, **arguments)
    except TypeError as exc:
        return str(exc)
    return None


def expect_faults(expect: Any, known: set[str]) -> Iterator[str]:
    if not isinstance(expect, dict):
        yield f"'expect' is an object, got {json.dumps(expect)[:60]}"
    elif way := next((way for way in ("any", "all") if way in expect), None):
        if not isinstance(expect[way], list) or not expect[way]:
            yield f"{way!r} is a list of expectations, got {json.dumps(expect[way])[:60]}"
            return
        for part in expect[way]:
            yield from expect_faults(part, known)
    elif "error" in expect or "value" in expect:
        only = {"error", "details", "says"} if "error" in expect else {"value", "without"}
        yield from (f"'expect' has no {name!r}" for name in sorted(expect.keys() - only))
    elif expect.get("check") not in CHECKS:
        yield (
            f"there is no check {expect['check']!r}, but {', '.join(CHECKS)}"
            if "check" in expect
            else "'expect' has one of 'value', 'error', 'check', 'any' and 'all'"
        )
    else:
        arguments = {name: value for name, value in expect.items() if name != "check"}
        if fault := unbound(CHECKS[expect["check"]], arguments):
            yield f"the check {expect['check']!r}: {fault}"
        if str(expect.get("like", "*")) not in {"*", *known}:
            yield f"no answer is called {expect['like']!r} so far"


def expected_failures(
    path: pathlib.Path, known: Sequence[Case], today: datetime.date
) -> list[ExpectedFailure]:
    """The list in the JSON file `path`; an incomplete, unmatched or expired entry is an error."""
    entries: dict[str, ExpectedFailure] = {}
    listed = read(path)
    if not isinstance(listed, list):
        raise ValueError(f"{path} is no list of known failures, but {json.dumps(listed)[:60]}.")
    for number, entry in enumerate(listed, 1):
        where = f"Expected failure {number} of {path}"
        fault = misshapen(entry, FAILURE, "a known failure")
        if fault or not all(entry.values()):
            empty = [name for name in FAILURE if not fault and not entry[name]]
            fault = fault or f"{', '.join(map(repr, empty))} is empty"
            raise ValueError(f"{where} must give {', '.join(FAILURE)}: {fault}.")
        name = entry["case"]
        if name not in {case.id for case in known}:
            raise ValueError(f"{where} names {name!r}, which is no case of this suite.")
        if name in entries:
            raise ValueError(f"{where} names {name!r} a second time.")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", entry["expires"]):
            raise ValueError(f"{where} expires on a day like 2030-01-31, not {entry['expires']!r}.")
        try:
            expires = datetime.date.fromisoformat(entry["expires"])
        except ValueError as exc:
            raise ValueError(f"{where} expires on {entry['expires']}: {exc}.") from exc
        if expires < today:
            raise ValueError(f"{where} ({name}) expired on {expires}: fix the engine or renew it.")
        entries[name] = ExpectedFailure(**{**entry, "expires": expires})
    return [*entries.values()]


def load_report(path: pathlib.Path) -> Report:
    """A report that can be rendered."""
    report = read(path)
    if fault := misshapen(report, REPORT, "a report", ["format", "partial"]):
        raise ValueError(f"{path} is no report: {fault}.")
    try:
        to_html([report])
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise ValueError(f"{path} is no report: {type(exc).__name__}: {exc}.") from exc
    return report
