"""The stored cases are those declared, cite living sentences, and every value in them counts."""

import json
import pathlib

import jsonschema
import pytest
from datarax_conformance import casebook, mutants, report, run_conformance, trace
from datarax_conformance.case import stored_cases
from datarax_conformance.model_adapter import Adapter
from datarax_conformance.mutants import Mutant, survives

pytestmark = pytest.mark.internal

SCHEMAS = pathlib.Path(casebook.__file__).parent / "schemas"
RESULTS = pathlib.Path(__file__).parents[2] / "conformance" / "results"


def test_the_case_book_is_what_a_build_makes():
    assert casebook.faults() == []


def test_a_touched_case_is_noticed(monkeypatch):
    monkeypatch.setattr(casebook, "digest", lambda text: "0" * 16)
    assert len(list(casebook.manifest_faults())) == len(stored_cases())


def test_an_edited_sentence_makes_its_citations_stale(monkeypatch):
    cited = casebook.requirements()
    edited = {
        name: type(r)(**{**vars(r), "rev": r.rev + (name == "ITER-004")})
        for name, r in cited.items()
    }
    monkeypatch.setattr(casebook, "requirements", lambda: edited)
    stale = list(casebook.stale_cites())
    assert stale and all("ITER-004" in fault and "read it again" in fault for fault in stale)


def test_every_must_has_a_case_and_a_mutant():
    assert list(trace.uncovered()) == []


def test_every_stored_value_counts():
    total, good, faults = mutants.data.check()
    assert faults == [] and total == good > 10_000


def test_the_model_unchanged_is_no_mutant():
    assert not list(mutants.noticing(Mutant("none", (), ()), mutants.cases_by_weight()[0]))


@pytest.mark.parametrize(
    "name", ["the last batch is lost", "the seed is cut to 31 bits", "look-ahead leaks"]
)
def test_a_mutant_dies(name):
    assert not survives(next(m for m in mutants.MUTANTS if m.name == name))


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*/report.json")), ids=lambda path: path.parent.name
)
def test_committed_reports_fit_the_schema(path):
    schema = json.loads((SCHEMAS / "report.schema.json").read_text())
    jsonschema.validate(json.loads(path.read_text()), schema)


def test_a_report_is_rendered_in_every_form():
    result = run_conformance(Adapter(), only=["STEP-001"])
    assert "1/1 profiles" in report.to_badge({**result, "partial": False})
    assert report.to_junit(result).count("<testcase") == 2
    assert 'id="STEP-001"' in report.to_html([result])
