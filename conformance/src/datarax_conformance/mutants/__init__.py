"""Checks that the suite detects faulty engines, stored values and comparators."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.pool import Pool

from ..case import Case, stored_cases
from . import automatic, comparator, data
from ._kill import cases_by_weight, misses_vectors, noticing, weight
from ._mutant import Mutant
from .semantic import BENIGN, MUTANTS


class Findings:
    """Collects the faults found, and prints a line for each kind of mutant."""

    def __init__(self) -> None:
        self.faults: list[str] = []

    def section(self, what: str, total: int, good: int, faults: Sequence[str]) -> None:
        share = f" ({good / total:.1%})" if total else ""
        print(f"{what}: {good} of {total}{share}", flush=True)
        self.faults += [f"{what}: {fault}" for fault in faults]


def citing(mutant: Mutant, case: Case) -> bool:
    return bool(set(mutant.breaks) & set(case.requirements))


def semantic_row(mutant: Mutant) -> list[str]:
    """The cases that notice a semantic mutant, of those that cite a requirement it breaks.

    Heavy cases are tried only for requirements that no light case has found broken.
    """
    light, heavy = ([case for case in cases if citing(mutant, case)] for cases in cases_by_weight())
    found = list(noticing(mutant, light))
    missing = set(mutant.breaks) - {name for case in found for name in case.requirements}
    found += noticing(mutant, [case for case in heavy if missing & set(case.requirements)])
    return [case.id for case in found]


def bites(case: Case) -> bool:
    """Whether this case notices a mutant. Mutants that break what it cites are tried first."""
    mutants = sorted(MUTANTS, key=lambda mutant: not citing(mutant, case))
    return any(list(noticing(mutant, [case])) for mutant in mutants)


def survives(mutant: Mutant) -> bool:
    """Whether no case notices the mutant. Leaving out the heaviest can only add survivors."""
    light, heavy = cases_by_weight()
    return (
        next(noticing(mutant, light), None) is None
        and not misses_vectors(mutant)
        and next(noticing(mutant, [c for c in heavy if weight(c) < 2**17]), None) is None
    )


def matrix(pool: Pool, only: str = "") -> dict[str, list[str]]:
    mutants = [mutant for mutant in MUTANTS if only in mutant.name and mutant.source]
    rows = pool.map(semantic_row, mutants, chunksize=1)
    return {mutant.name: row for mutant, row in zip(mutants, rows, strict=True)}


def check_semantic(pool: Pool, only: str, findings: Findings) -> dict[str, list[str]]:
    rows = matrix(pool, only)
    cases = {case.id: case for case in stored_cases()}
    faults = []
    for mutant in MUTANTS:
        if mutant.name not in rows:
            continue
        if not rows[mutant.name]:
            faults.append(f"{mutant.name!r} survives")
        for name in mutant.breaks:
            if not any(name in cases[case].requirements for case in rows[mutant.name]):
                faults.append(f"{mutant.name!r} breaks {name}, but no case that cites it notices")
    findings.section(
        "semantic mutants killed by a case that cites what they break",
        len(rows),
        len(rows) - len(faults),
        faults,
    )
    return rows


def check_teeth(pool: Pool, rows: dict[str, list[str]], findings: Findings) -> None:
    """Every case must notice at least one mutant."""
    biting = {case for row in rows.values() for case in row}
    others = [case for case in stored_cases() if case.id not in biting]
    toothless = zip(others, pool.map(bites, others, chunksize=1), strict=True)
    faults = [f"{case.id} notices no mutant" for case, found in toothless if not found]
    total = len(stored_cases())
    findings.section("cases with teeth", total, total - len(faults), faults)


def failing(mutant: Mutant) -> list[str]:
    return [case.id for case in noticing(mutant, cases_by_weight()[0])]


def check_benign(pool: Pool, findings: Findings) -> None:
    found = zip(BENIGN, pool.map(failing, BENIGN, chunksize=1), strict=True)
    faults = [f"{m.name!r} is fine, but {', '.join(cases)} fails" for m, cases in found if cases]
    findings.section("benign variants that pass", len(BENIGN), len(BENIGN) - len(faults), faults)


def check_automatic(pool: Pool, findings: Findings) -> None:
    mutants = automatic.automatic()
    alive = pool.map(survives, mutants, chunksize=4)
    survivors = {mutant.name for mutant, lives in zip(mutants, alive, strict=True) if lives}
    explained = automatic.survivors_explained()
    faults = [
        f"{name!r} survives and nobody has said why"
        for name in sorted(survivors - explained.keys())
    ]
    faults += [
        f"{name!r} is explained, but does not survive"
        for name in sorted(explained.keys() - survivors)
    ]
    if len(survivors) > 0.05 * len(mutants):
        faults.append(f"{len(survivors)} of {len(mutants)} survive, which is more than 5 %")
    findings.section(
        "automatic mutants of the model killed", len(mutants), len(mutants) - len(survivors), faults
    )


def check(strict: bool, only: str = "") -> int:
    start = time.monotonic()
    findings = Findings()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        rows = check_semantic(pool, only, findings)
        if not only:
            check_automatic(pool, findings)
            check_teeth(pool, rows, findings)
            check_benign(pool, findings)
    if not only:
        findings.section("stored values that count", *data.check())
        findings.section("comparators that are noticed", *comparator.check())
    print(
        *findings.faults,
        f"{len(findings.faults)} faults in {time.monotonic() - start:.0f} s",
        sep="\n",
    )
    return int(strict and bool(findings.faults))
