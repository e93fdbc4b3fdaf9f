"""Finds requirements that no case or no semantic mutant checks."""

from __future__ import annotations

from collections.abc import Iterator

from .case import stored_cases
from .casebook import manifest_faults, stale_cites
from .mutants.semantic import MUTANTS
from .requirements import requirements


def gaps() -> list[str]:
    """MUSTs without a case or a mutant, faults of the manifest, and stale citations."""
    return [*uncovered(), *manifest_faults(), *stale_cites()]


def uncovered() -> Iterator[str]:
    cited = {name for case in stored_cases() for name in case.requirements}
    broken = {name for mutant in MUTANTS for name in mutant.breaks}
    for name, requirement in requirements().items():
        if requirement.level != "MUST":
            continue
        if name not in cited:
            yield f"{name} ({requirement.profile}) has no case"
        if name not in broken:
            yield f"{name} ({requirement.profile}) has no mutant"
    for name in sorted(broken - requirements().keys()):
        yield f"a mutant breaks {name}, which is no requirement"
