"""The eighteen goals of the suite, each with a figure.

The goals concern the whole project, so they need its checkout.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from xml.etree import ElementTree

from . import mutants, report, spec, trace, vectors
from .api import run_conformance
from .case import stored_cases
from .casebook import faults, stale_cites
from .files import expected_failures
from .mutants._mutant import adapter_of
from .requirements import requirements
from .version import SPEC, VERSION

Answer = tuple[bool, str]

# Faults of released engines that ordinary cases found: committed report, case.
KNOWN_FAULTS = (
    ("grain", "SHUF-001-around-2-16"),  # of 65 537 records one never comes
    ("grain", "SHUF-009-next"),  # the second epoch of seed 0 is the first of seed 1
    ("grain", "SHUF-010-n1000000000"),  # neighbours among a billion records
    ("datarax-0.1.3", "SHUF-001-cut"),  # a new order at every step
    ("datarax-0.1.3", "ERR-004-after"),  # the cycle error names bystanders
    ("datarax-0.1.3", "ERR-008-none"),  # a node without an entry in the edges
    ("datarax-0.1.4", "SHUF-001-cut"),
    ("datarax-0.1.4", "STEP-017-for"),  # a changed parameter is not seen
    ("datarax-0.1.17", "ITER-006-again"),  # the second loop is empty
    ("datarax-0.1.17", "ITER-013-four"),  # threads lose batches
    ("datarax-0.1.17", "STEP-017-for"),
    ("datarax-0.1.17", "SRC-005-above"),  # 64-bit values cut
    ("datarax-0.1.17", "SRC-022-turns"),  # mixed sources draw with replacement
    ("datarax-0.1.17", "STATE-009-seed"),  # a state of another seed
    ("datarax-0.1.17", "DAG-017-modes"),  # an overridden call
)


def root() -> pathlib.Path:
    return spec.find_root()


def suite() -> pathlib.Path:
    return root() / "conformance"


def python(
    *arguments: str, cwd: pathlib.Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd or suite(), env={**os.environ, **variables}, text=True, capture_output=True
    )


def committed() -> dict[str, report.Report]:
    folders = sorted((suite() / "results").glob("*/report.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in folders}


def every_must() -> Answer:
    gaps = list(trace.uncovered())
    musts = [r for r in requirements().values() if r.level == "MUST"]
    open_ = {gap.split()[0] for gap in gaps}
    covered = len(musts) - len(open_)
    rest = {requirements()[name].profile for name in open_ if name in requirements()}
    text = f"{covered} of {len(musts)} MUSTs have a case and a mutant"
    return not gaps, text + (
        f"; the others are in profile {', '.join(sorted(rest))}" if rest else ""
    )


def no_orphans() -> Answer:
    found = [*spec.read(root()).faults, *stale_cites()]
    return not found, f"{len(found)} normative words outside a requirement or stale citations"


def prose_is_oracle() -> Answer:
    stale = spec.check(root())
    examples = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/spec/test_examples.py", cwd=root()
    )
    return (
        not stale and not examples.returncode,
        f"{len(stale)} stale files; examples: {last_line(examples.stdout)}",
    )


def tables_generate() -> Answer:
    tests = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/spec/test_tables.py", cwd=root()
    )
    return not tests.returncode, last_line(tests.stdout)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1].strip("= ")


def engines_agree() -> Answer:
    start = time.monotonic()
    live = run_conformance(str(suite() / "adapters" / "datarax_reference.py") + ":Adapter", jobs=2)
    seconds = time.monotonic() - start
    bad = {
        name: r["summary"] for name, r in committed().items() if name in ("model", "numpy-naive")
    }
    bad["datarax-reference"] = live["summary"]
    clean = len(bad) == 3 and all(set(summary) == {"PASS"} for summary in bad.values())
    listed = list((suite() / "adapters").glob("*expected*"))
    figures = ", ".join(
        f"{name} {summary.get('PASS', 0)}/{sum(summary.values())}" for name, summary in bad.items()
    )
    return (
        clean and not listed and seconds <= 60,
        f"{figures}; reference in {seconds:.0f} s; {len(listed)} expected failures",
    )


def vectors_hold() -> Answer:
    check = python("-m", "datarax_conformance.vectors", "check")
    sys.path.insert(0, str(suite() / "adapters"))
    naive = importlib.import_module("naive")  # the second producer

    total = agreed = 0
    for path in (pathlib.Path(vectors.__file__).parent / "order").glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        for case in data["cases"]:
            offsets = case.get("offsets", range(data["length"]))
            for offset, record in list(zip(offsets, case["records"], strict=True))[::8]:
                total += 1
                agreed += (
                    naive.record_at(case["seed"], case["epoch"], data["length"], offset) == record
                )
    return (
        not check.returncode and agreed == total,
        f"{last_line(check.stdout)}; second producer agrees on {agreed} of {total}",
    )


def every_value_counts() -> Answer:
    listing = python("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider",
                     "-p", "datarax_conformance.plugin",
                     "--pyargs", "datarax_conformance.suite")  # fmt: skip
    collected = {
        line.partition("[")[2].rstrip("]") for line in listing.stdout.splitlines() if "[" in line
    }
    same = collected == {case.id for case in stored_cases()}
    total, good, _ = mutants.data.check()
    found = faults()
    return (
        same and good == total and not found,
        f"{len(collected)} cases collected, {good} of {total} flips noticed, {len(found)} faults",
    )


def teeth() -> Answer:
    start = time.monotonic()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        bad = mutants.check(strict=True)
    seconds = time.monotonic() - start
    lines = [line for line in out.getvalue().splitlines() if " of " in line and "(" in line]
    return not bad and seconds <= 300, "; ".join(lines) + f"; {seconds:.0f} s"


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datarax", "jax", "jaxlib", "flax"):
            raise AssertionError(f"the suite imports {name}")
sys.meta_path.insert(0, Blocker())
from datarax_conformance import run_conformance
from datarax_conformance.model_adapter import Adapter
print(run_conformance(Adapter(), only=["iter", "resume", "scan"])["summary"])
"""


def imports_nothing() -> Answer:
    done = python("-c", BLOCKER)
    return not done.returncode, last_line(
        done.stdout or done.stderr
    ) + " with datarax and JAX blocked"


def newcomer() -> Answer:
    done = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/conformance/test_newcomer.py",
        cwd=root(),
        CONFORMANCE_SLOW="1",
    )
    lines = (
        (pathlib.Path(__file__).parent / "template_adapter.py")
        .read_text(encoding="utf-8")
        .count("\n")
    )
    return (
        not done.returncode and lines <= 60,
        f"adapter of {lines} lines; {last_line(done.stdout)}",
    )


def honest_skips() -> Answer:
    cases = stored_cases()
    good = {"case": cases[0].id, "reason": "r", "link": "l", "expires": "2999-01-01"}
    wrong = [
        {**good, "case": "NO-000"},
        {**good, "expires": "2000-01-01"},
        {k: v for k, v in good.items() if k != "link"},
    ]
    refused = 0
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "expected.json"
        for entry in wrong:
            path.write_text(json.dumps([entry]), encoding="utf-8")
            try:
                expected_failures(path, cases, datetime.date.today())
            except ValueError:
                refused += 1
        path.write_text(json.dumps([good]), encoding="utf-8")
        listed = expected_failures(path, cases, datetime.date.today())
    from .model_adapter import Adapter

    unexpected = run_conformance(Adapter(), only=[cases[0].id], expected=listed)["summary"] == {
        "XPASS": 1
    }
    return (
        refused == 3 and unexpected,
        f"{refused} of 3 bad entries refused, "
        f"unexpected pass is {'an error' if unexpected else 'missed'}",
    )


NAMED = ("case", "cites", "sentence", "link", "minimal", "expected", "got", "replay", "reason")


def failures_explain() -> Answer:
    total = complete = 0
    for mutant in mutants.MUTANTS:
        result = run_conformance(
            adapter_of(mutant), only=list(mutant.breaks), blocking=False, timeout=10
        )
        failures = [entry for entry in result["verdicts"] if entry["outcome"] == "FAIL"][:3]
        total += len(failures)
        complete += sum(
            all(entry.get(name) not in (None, "") for name in NAMED) for entry in failures
        )
    return (
        total == complete > 0,
        f"{complete} of {total} failures of {len(mutants.MUTANTS)} mutants say everything",
    )


def no_cascades() -> Answer:
    from .model_adapter import Adapter

    class BrokenStep(Adapter):
        def build(self, program: Any, ops: Any) -> Any:
            stream = super().build(program, ops)
            # Break the engine on purpose: this method of the stream always fails.
            stream.take = lambda stay: 1 / 0  # type: ignore[method-assign]
            return stream

    summary = run_conformance(BrokenStep())["summary"]
    return (
        summary.get("FAIL", 0) <= 3,
        f"a broken step gives {summary.get('FAIL', 0)} FAIL "
        f"and {summary.get('BLOCKED', 0)} BLOCKED",
    )


def same_verdict() -> Answer:
    digests = set()
    for number in range(10):
        done = python("-m", "datarax_conformance", "run", "adapters/numpy_naive.py:Adapter",
                      "--jobs", "2", "--shuffle", str(number),
                      PYTHONHASHSEED=str(number))  # fmt: skip
        digests.add(last_line(done.stdout))
    return len(
        digests
    ) == 1, f"{len(digests)} digest in 10 runs, each in another order and with another hash seed"


def reports_hold() -> Answer:
    import jsonschema

    schema = json.loads(
        (pathlib.Path(__file__).parent / "schemas" / "report.schema.json").read_text(
            encoding="utf-8"
        )
    )
    reports = committed()
    for name, result in reports.items():
        jsonschema.validate(result, schema)
        ElementTree.parse(suite() / "results" / name / "junit.xml")
        ElementTree.parse(suite() / "results" / name / "badge.svg")
    again = python("engines.py", "check", "model", "numpy-naive")
    return not again.returncode and bool(
        reports
    ), f"{len(reports)} committed reports fit the schema; {last_line(again.stdout)}"


def versions() -> Answer:
    return VERSION.rpartition(".")[
        0
    ] == SPEC, f"suite {VERSION} for spec {SPEC}, the first: no older verdict to keep"


def engines_and_faults() -> Answer:
    reports = committed()
    found = [
        (name, case)
        for name, case in KNOWN_FAULTS
        if any(
            e["case"] == case and e["outcome"] == "FAIL"
            for e in reports.get(name, {"verdicts": []})["verdicts"]
        )
    ]
    missed = [f"{name} {case}" for name, case in KNOWN_FAULTS if (name, case) not in found]
    text = (
        f"{len(reports)} engines with results, "
        f"{len(found)} of {len(KNOWN_FAULTS)} faults of releases replayable"
    )
    return len(reports) >= 5 and len(found) >= 3 and not missed, text + (
        f"; missing: {', '.join(missed)}" if missed else ""
    )


GOALS: Sequence[tuple[str, Callable[[], Answer]]] = (
    ("every MUST has an id, a case and a mutant", every_must),
    ("no orphan normative word, no stale citation", no_orphans),
    ("the spec's Python is the oracle", prose_is_oracle),
    ("tables generate constants, codes and schema", tables_generate),
    ("model, reference and an independent engine agree", engines_agree),
    ("vectors rebuild, and have two producers", vectors_hold),
    ("every stored value is read", every_value_counts),
    ("the suite has teeth", teeth),
    ("the suite imports neither datarax nor JAX", imports_nothing),
    ("an adapter in ten minutes", newcomer),
    ("three ways from an installed wheel", newcomer),
    ("honest skips", honest_skips),
    ("every failure explains itself", failures_explain),
    ("no cascades", no_cascades),
    ("the same verdict every time", same_verdict),
    ("reports in four forms, made again", reports_hold),
    ("the suite follows the spec's version", versions),
    ("five engines, three faults of releases", engines_and_faults),
)


def main(numbers: Sequence[int]) -> int:
    """Prints a line for each goal. Returns 1 if any does not hold."""
    bad = 0
    known: dict[Callable[[], Answer], Answer] = {}
    for number, (what, check) in enumerate(GOALS, 1):
        if numbers and number not in numbers:
            continue
        if check not in known:
            try:
                known[check] = check()
            except Exception as exc:
                known[check] = False, f"{type(exc).__name__}: {exc}"
        holds, figure = known[check]
        bad += not holds
        print(f"{number:2} {'holds' if holds else 'OPEN '}  {what}: {figure}", flush=True)
    return int(bool(bad))
