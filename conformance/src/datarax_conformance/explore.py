"""Searches for faults that no stored case shows: Hypothesis runs engine and model side by side.

`explore` prints a fault as a case that can be stored. Only stored cases give verdicts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

try:
    from hypothesis import HealthCheck, settings, strategies as st
    from hypothesis.stateful import (
        RuleBasedStateMachine,
        initialize,
        precondition,
        rule,
        run_state_machine_as_test,
    )
except ModuleNotFoundError as error:
    raise ValueError(
        "`explore` needs Hypothesis: pip install 'datarax-conformance[explore]'"
    ) from error

from .api import engine_for
from .compare import difference
from .declared._declare import chain, program
from .engine import Engine, Local, Lost
from .model_adapter import Adapter
from .runner import hello

PROGRAM = st.builds(
    lambda count, size, policy, seed: program(
        count, min(size, count) if policy == "drop" else size, policy, seed=seed
    ),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sampled_from(["keep", "drop", "pad"]),
    st.none() | st.integers(0, 2**32 - 1),
)
CHAIN = st.builds(
    lambda count, size, ops: chain(count, size, "keep", *ops),
    st.integers(1, 20),
    st.integers(1, 8),
    st.lists(
        st.sampled_from(["affine(2,1)", "affine(-1,3)", "add", "count"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
)


def answer_of(engine: Engine, action: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return engine.execute(action, 60)
    except Lost as lost:
        return {"fault": f"{lost.outcome}: {lost}"}


class Machine(RuleBasedStateMachine):
    """Sends the same actions to the model and to the engine. Their answers must be equal."""

    engine: Engine
    profiles: set[str]

    def __init__(self) -> None:
        super().__init__()
        self.model = Local(Adapter())
        self.script: list[dict[str, Any]] = []
        self.program: dict[str, Any] = {}

    def claims(self, *profiles: str) -> bool:
        return set(profiles) <= self.profiles

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        kinds = [PROGRAM.filter(lambda p: p["seed"] is None or self.claims("shuffle.exact"))]
        kinds += [CHAIN] if self.claims("dag") else []
        self.program = data.draw(st.one_of(kinds))
        for engine in (self.model, self.engine):
            answer_of(engine, {"do": "begin", "program": self.program})
        self.both({"do": "build"})

    def both(self, action: dict[str, Any]) -> None:
        self.script.append(action)
        expected = self.model.execute(action, 60)
        got = answer_of(self.engine, action)
        if "fault" in got:
            fault = got["fault"]
        elif "value" in expected and action["do"] != "save":
            fault = difference(expected, got)
        else:
            fault = difference(
                expected.get("error", {}).get("code"), got.get("error", {}).get("code")
            )
        assert fault is None, (
            f"{fault}\n{json.dumps({'program': self.program, 'script': self.script})}"
        )

    @precondition(lambda self: self.claims("step"))
    @rule(n=st.integers(1, 4))
    def step(self, n: int) -> None:
        self.both({"do": "step", "n": n})

    @precondition(lambda self: self.claims("iter"))
    @rule(take=st.none() | st.integers(1, 4))
    def loop(self, take: int | None) -> None:
        self.both({"do": "for", "take": take})

    @precondition(lambda self: self.claims("scan"))
    @rule(length=st.none() | st.integers(0, 4))
    def scan(self, length: int | None) -> None:
        self.both({"do": "scan", "length": length})

    @precondition(lambda self: self.claims("resume"))
    @rule()
    def resume(self) -> None:
        self.both({"do": "save", "to": "s"})
        self.both({"do": "build"})
        self.both({"do": "restore", "origin": "s"})


def explore(target: str, examples: int) -> int:
    """Runs the engine `target` on `examples` random programs."""
    if examples < 1:
        raise ValueError(f"There is at least 1 example, got {examples}.")
    engine = engine_for(target)()
    try:
        profiles = set(hello(engine, 60)["capabilities"])
        machine = type("Explore", (Machine,), {"engine": engine, "profiles": profiles})
        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=examples, deadline=None, suppress_health_check=checks),
        )
    except AssertionError as found:
        print(found)
        return 1
    finally:
        engine.close()
    print(f"{examples} programs, no difference")
    return 0
