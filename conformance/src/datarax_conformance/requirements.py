"""The requirements that cases cite, from `spec.json`, which the spec's build writes."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Requirement:
    id: str
    title: str
    level: str
    profile: str
    needs: tuple[str, ...]
    rev: int
    hash: str
    place: str  # chapter.md#ID
    text: str

    @property
    def cite(self) -> str:
        return f"{self.id}@{self.rev}"


@functools.cache
def requirements() -> Mapping[str, Requirement]:
    path = pathlib.Path(__file__).parent / "spec.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["requirements"]
    return {
        name: Requirement(name, **{**entry, "needs": tuple(entry["needs"])})
        for name, entry in entries.items()
    }


def needed_by(names: Sequence[str]) -> list[str]:
    """All requirements that `names` need, also indirectly, each after those that it needs."""
    seen: dict[str, None] = {}

    def visit(name: str) -> None:
        for need in requirements()[name].needs:
            if need not in seen:
                visit(need)
                seen[need] = None

    for name in names:
        visit(name)
    return list(seen)
