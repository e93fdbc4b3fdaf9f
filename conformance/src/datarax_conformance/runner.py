"""The runner. The command line, the pytest plugin and `run_conformance` all use it."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import fnmatch
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .adapter import PROFILES
from .arrays import unreadable
from .case import Case, stored_cases
from .compare import ANYTHING, deviation
from .engine import Engine, Lost
from .requirements import needed_by
from .session import IN_MEMORY
from .version import SPEC, VERSION

BAD = ("FAIL", "CRASH", "TIMEOUT", "ADAPTER-ERROR", "XPASS")
OUTCOMES = (
    "PASS",
    "FAIL",
    "BLOCKED",
    "UNSUPPORTED",
    "N/A",
    "CRASH",
    "TIMEOUT",
    "ADAPTER-ERROR",
    "XFAIL",
    "XPASS",
)
UNEXPECTED = "it is listed as a known failure, but passes: remove the entry"
MET = ("PASS", "N/A", "UNSUPPORTED")  # outcomes that do not block cases that need the case


@dataclasses.dataclass(frozen=True)
class Verdict:
    case: Case
    outcome: str
    reason: str = ""
    action: int | None = None  # where the engine deviated
    expected: Any = None
    got: Any = None
    trace: str = ""  # where in the engine it happened, or its last words; never compared


# Actions that use no stream. The others use the one that `on` names.
ASKING_NONE = {"begin", "build", "restart", "next", "recall", "scribble", "columns"}
ASKING_NONE |= {"global_random"}
NOT_BUILT: dict[str, Any] = {
    "error": {"code": "not-built", "details": {}, "type": "", "message": "it was refused"}
}


def as_sent(action: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    """The action as the engine gets it: `restore` with the bytes of the state, cut by `part`."""
    sent = {k: v for k, v in action.items() if k not in ("expect", "note", "part")}
    if action["do"] == "restore":
        sent["base64_"] = notes[action["origin"]]["base64"]
    if "part" in action:  # under a name that no state has, so that the session takes these bytes
        state = base64.b64decode(sent["base64_"])
        state = state[: int(len(state) * action["part"])]
        sent["base64_"] = base64.b64encode(state).decode()
        sent["origin"] += f", {action['part']} of it"
    return sent


def play(case: Case, engine: Engine, timeout: float) -> Verdict:
    """Runs one case up to the first deviation.

    If the engine refused the program of a stream, as the case allows, it gets no more actions for
    that stream.
    """
    deadline = time.monotonic() + timeout
    notes: dict[str, Any] = {}
    refused: set[str] = set()
    index: int | None = None
    expect: Mapping[str, Any] = ANYTHING

    def ask(action: Mapping[str, Any]) -> dict[str, Any]:
        return engine.execute(action, max(0.0, deadline - time.monotonic()))

    try:
        begin = {"do": "begin", "program": case.program}
        answer = ask(begin)
        for index, action in enumerate(case.script):
            if "fault" in answer:
                break
            if action["do"] == "restart":
                engine.restart()
                refused.clear()
                answer = ask(begin)
                continue
            expect = action.get("expect", ANYTHING)
            if action["do"] not in ASKING_NONE and action.get("on", "main") in refused:
                answer = NOT_BUILT
            else:
                answer = ask(as_sent(action, notes))
            if "fault" in answer:
                break
            large = any(feature.startswith("records ") for feature in case.features)
            if large and answer.get("error", {}).get("code") == IN_MEMORY:
                return Verdict(case, "UNSUPPORTED", "the engine holds its columns in memory")
            try:
                reason = deviation(expect, answer, notes)
            except (LookupError, TypeError, ValueError, AttributeError) as exc:
                why = unreadable(answer["value"]) or f"{type(exc).__name__}: {exc}"
                reason = f"no value of the form that {action['do']!r} gives: {why}"
                return Verdict(case, "ADAPTER-ERROR", reason, index, expect, answer)
            if reason:
                with contextlib.suppress(Lost):  # if it has said more, it begins anew
                    engine.check_silent()
                why = unreadable(answer.get("value"))
                reason = f"{reason} ({why})" if why else reason
                trace = str(answer.get("error", {}).pop("trace", ""))
                return Verdict(case, "FAIL", reason, index, expect, answer, trace)
            if action["do"] == "build":
                stream = action.get("to", "main")
                refused = refused | {stream} if "error" in answer else refused - {stream}
            name = action.get("note", action["to"] if action["do"] == "save" else None)
            if name is not None:
                notes[name] = answer["value"]
        engine.check_silent()
    except Lost as lost:
        limit = f": a case has {timeout:g} s" if lost.outcome == "TIMEOUT" else ""
        return Verdict(case, lost.outcome, f"{lost}{limit}", index, expect, trace=lost.trace)
    if "fault" in answer:
        return Verdict(case, "ADAPTER-ERROR", answer["fault"], index, expect)
    return Verdict(case, "PASS")


@dataclasses.dataclass(frozen=True)
class ExpectedFailure:
    """A known failure: the case, the reason, a link, and the day on which the entry expires."""

    case: str
    reason: str
    link: str
    expires: datetime.date


def alike(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases in groups whose programs differ at most in the seed, the longest group first.

    An engine that compiles a program can reuse it for the rest of the group. If a long group came
    last, one process would run it while the others are idle.
    """
    groups: dict[str, list[Case]] = {}
    for case in cases:
        program = json.dumps({**case.program, "seed": None}, sort_keys=True)
        groups.setdefault(program, []).append(case)
    return sorted(groups.values(), key=lambda group: -sum(len(case.script) for case in group))


class AdapterError(ValueError):
    """No case can run on an adapter. The message says why in one line."""


def wrong_claim(identity: Any) -> str | None:
    """Why an adapter cannot be judged, given its answer to `hello`, or None."""
    if not isinstance(identity, dict):
        return f"it answers `hello` with {identity!r}, not with its name, version, …"
    for name in ("name", "version", "spec", "capabilities"):
        if name not in identity:
            return f"it does not give its `{name}`"
    claimed, spec = identity["capabilities"], identity["spec"]
    for name in ("name", "version"):
        if not isinstance(identity[name], str) or not identity[name]:
            return f"`{name}` is a text, got {identity[name]!r}"
    if not isinstance(claimed, list) or not all(isinstance(name, str) for name in claimed):
        return f"`capabilities` is a set of profiles, as texts, got {claimed!r}"
    if not claimed:
        return f"`capabilities` is empty: claim some of {', '.join(PROFILES)}"
    if unknown := sorted(set(claimed) - set(PROFILES)):
        return f"{unknown[0]!r} in `capabilities` is no profile; there are {', '.join(PROFILES)}"
    if spec != SPEC:
        return f"it follows spec {spec!r}, but version {VERSION} of the suite checks spec {SPEC!r}"
    limits = identity.get("limits", {})
    if not isinstance(limits, dict) or not all(isinstance(x, str) for x in limits.values()):
        return f"`limits` gives a reason for each feature, as a text, got {limits!r}"
    asked = {feature for case in stored_cases() if limits for feature in case.features}
    for limit, reason in limits.items():
        if not reason:
            return f"the limit {limit!r} gives no reason"
        if not fnmatch.filter(asked, limit):
            return (
                f"the limit {limit!r} names nothing that an engine may lack within a profile, "
                "as 'last_batch pad' and 'records *' do"
            )
    return None


def hello(engine: Engine, timeout: float) -> dict[str, Any]:
    """The adapter's answer to `hello`. Raises `AdapterError` if no case can run with it."""
    answer: dict[str, Any]
    try:
        answer = engine.execute({"do": "hello"}, timeout)
    except Lost as lost:
        answer = {"fault": f"{lost.outcome}: {lost}"}
    fault = answer.get("fault") or answer.get("error", {}).get("message")
    if fault := fault or wrong_claim(answer.get("value")):
        raise AdapterError(f"The adapter cannot be run: {' '.join(fault.split())}")
    return answer["value"]


class Run:
    """The verdicts on one engine. Each is computed once, in any order."""

    def __init__(
        self,
        new_engine: Callable[[], Engine],
        cases: Sequence[Case],
        *,
        expected: Sequence[ExpectedFailure] = (),
        timeout: float = 60.0,
        blocking: bool = True,
        in_order: bool = False,
        jobs: int = 1,
    ):
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"The timeout is a number of seconds above 0, got {timeout:g}.")
        if jobs < 1:
            raise ValueError(f"There is at least 1 job, got {jobs}.")
        self.cases = cases
        self.groups = [[case] for case in cases] if in_order else alike(cases)
        self.expected = {entry.case for entry in expected}
        self.timeout = timeout
        self.basic = {case.requirement: case for case in cases if case.basic} if blocking else {}
        self.verdicts: dict[str, concurrent.futures.Future[Verdict]] = {}
        self.lock = threading.Lock()
        self.new_engine = new_engine
        self.jobs = jobs
        self.engines = [new_engine() for _ in range(jobs)]  # processes start at the first action
        self.idle = list(self.engines)
        self.local = threading.local()
        self.closed = False
        try:
            self.identity = hello(self._engine(), timeout)
        except BaseException:
            self.close()
            raise

    def _engine(self) -> Engine:
        if not hasattr(self.local, "engine"):
            with self.lock:
                if not self.idle:
                    self.idle = [self.new_engine()]
                    self.engines += self.idle
                self.local.engine = self.idle.pop()
        return self.local.engine

    def limit(self, case: Case) -> str:
        """The adapter's limits that the case meets, with their reasons; empty if there are none."""
        limits = self.identity.get("limits", {})
        found = [limit for limit in limits if fnmatch.filter(case.features, limit)]
        return "; ".join(f"{limit}: {limits[limit]}" for limit in found)

    def needs(self, case: Case) -> list[str]:
        """The requirements that must hold before the case can judge its own."""
        own = [] if case.basic else [case.requirement]
        return [*needed_by(case.requirements), *case.needs, *own]

    def verdict(self, case: Case) -> Verdict:
        """The verdict on a case. The first thread that asks computes it, and the others wait.

        Needs have no cycle, so there is no deadlock.
        """
        with self.lock:
            known = case.id in self.verdicts
            verdict = self.verdicts.setdefault(case.id, concurrent.futures.Future())
        if not known:
            try:
                verdict.set_result(self._work_out(case))
            except BaseException as error:
                verdict.set_exception(error)
        return verdict.result()

    def _work_out(self, case: Case) -> Verdict:
        if unclaimed := sorted(set(case.profiles) - set(self.identity["capabilities"])):
            return Verdict(case, "N/A", f"does not claim {', '.join(unclaimed)}")
        if limit := self.limit(case):
            return Verdict(case, "UNSUPPORTED", limit)
        for name in self.needs(case):
            if name in self.basic and self.verdict(self.basic[name]).outcome not in MET:
                return Verdict(case, "BLOCKED", f"needs {name}")
        verdict = play(case, self._engine(), self.timeout)
        if case.id in self.expected:
            if verdict.outcome == "PASS":
                return dataclasses.replace(verdict, outcome="XPASS", reason=UNEXPECTED)
            known = {"FAIL": "XFAIL", "CRASH": "XFAIL", "TIMEOUT": "XFAIL"}
            return dataclasses.replace(verdict, outcome=known.get(verdict.outcome, verdict.outcome))
        return verdict

    def all(self) -> list[Verdict]:
        """All verdicts in the order of `cases`, computed in the order of `groups`."""

        def work_out(group: Sequence[Case]) -> None:
            for case in group:
                if not self.closed:
                    self.verdict(case)

        if self.jobs == 1:  # in this thread, for a debugger
            for group in self.groups:
                work_out(group)
        else:
            self.idle = list(self.engines)  # also the one that answered `hello`
            with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
                try:
                    list(pool.map(work_out, self.groups))
                except BaseException:  # Ctrl-C: the pool waits for its threads, which wait for
                    self.close()  # the engines
                    raise
        return [self.verdict(case) for case in self.cases]

    def close(self) -> None:
        self.closed = True
        for engine in self.engines:
            engine.close()
