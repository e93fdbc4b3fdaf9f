"""Stored cases: a program, a script of actions, and the expected answer to each action."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .arrays import FAR

HOME = pathlib.Path(__file__).parent / "cases"

# Actions that make up a profile, or that the suite does itself. They are no features: an engine
# that claims the profile cannot lack them.
GIVEN = {"build", "step", "iter", "next", "for", "scan", "save", "restore"}
GIVEN |= {"restart", "recall", "columns"}


@dataclasses.dataclass(frozen=True)
class Case:
    id: str  # the first requirement it cites, and a slug
    title: str
    cites: Sequence[str]  # "ITER-004@1"
    needs: Sequence[str]  # requirements that it relies on, besides those that the cited need
    profiles: Sequence[str]  # the engine must claim all of them
    # The simplest case of its requirement. If it fails, cases that need that one are BLOCKED.
    basic: bool
    program: Mapping[str, Any]
    script: Sequence[Mapping[str, Any]]
    file: str = ""  # where it was read from, if it is not stored

    @property
    def requirement(self) -> str:
        return self.requirements[0]

    @property
    def requirements(self) -> list[str]:
        return [cite.partition("@")[0] for cite in self.cites]

    @property
    def features(self) -> frozenset[str]:
        """What the case uses besides its profiles. An adapter's `limits` may name these."""
        found: set[str] = set()
        programs = [self.program]
        for action in self.script:
            found.add(f"ask {action['what']}" if action["do"] == "ask" else action["do"])
            found |= {f"{action['do']} {action['way']}"} if "way" in action else set()
            found |= {"restore edit"} if "edit" in action else set()
            programs += [{**self.program, **action}] if action["do"] == "build" else []
        for program in programs:
            options = program.get("options", {})
            source = options.get("source", {})
            found.add(f"last_batch {program['last_batch']}")
            rows = (column.get("range", 0) for column in program["columns"].values())
            found |= {f"records {n}" for n in rows if n > FAR}
            found |= {f"op {form.partition('(')[0]}" for form in program["nodes"].values()}
            found |= {f"option {name}" for name in options.keys() - {"source"}}
            found |= {f"source {source['form']}"} if source else set()
            found |= {f"source.{name}" for name in source.keys() - {"form"}}
        return frozenset(found) - GIVEN

    def until(self, action: int) -> Case:
        """The same case, but its script ends with this action."""
        return dataclasses.replace(self, script=list(self.script)[: action + 1])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        del data["file"]
        return data

    @property
    def path(self) -> pathlib.Path:
        return HOME / self.profiles[0] / f"{self.id}.json"


def load_case(path: pathlib.Path) -> Case:
    return Case.from_json(json.loads(path.read_text(encoding="utf-8")))


def stored_cases() -> list[Case]:
    return sorted(map(load_case, HOME.glob("*/*.json")), key=lambda case: case.id)


def selected(cases: Iterable[Case], names: Sequence[str]) -> list[Case]:
    """The cases whose id, requirement or profile is named; a name that fits nothing is an error."""
    cases = list(cases)
    chosen: dict[str, Case] = {}
    for name in names:
        found = [c for c in cases if name in (c.id, *c.requirements, *c.profiles)]
        if not found:
            raise ValueError(f"No stored case has the id, requirement or profile {name!r}.")
        chosen |= {case.id: case for case in found}
    return [chosen[key] for key in sorted(chosen)] if names else cases
