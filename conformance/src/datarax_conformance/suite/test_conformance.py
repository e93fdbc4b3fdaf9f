"""One test for each stored case; `--adapter` names the engine."""

import shlex

import pytest

from datarax_conformance.case import Case
from datarax_conformance.report import make_entry, to_paragraph
from datarax_conformance.runner import BAD, Run


def test_case(conformance_case: Case, conformance_run: Run, request: pytest.FixtureRequest) -> None:
    verdict = conformance_run.verdict(conformance_case)
    if verdict.outcome in BAD:
        adapter = request.config.getoption("--adapter")
        assert adapter is not None  # the run has refused to start without one
        entry = make_entry(verdict, shlex.quote(adapter))
        pytest.fail(to_paragraph(entry), pytrace=False)
    if verdict.outcome == "XFAIL":
        pytest.xfail(verdict.reason)
    if verdict.outcome != "PASS":
        pytest.skip(f"{verdict.outcome}: {verdict.reason}")
