"""What is wrong with a file of the user's is said in one line that names it, with exit code 2."""

import datetime
import json
import pathlib
import re

import pytest
from datarax_conformance import cli, run_conformance
from datarax_conformance.case import stored_cases
from datarax_conformance.files import case_faults, expected_failures, load_own, load_report
from datarax_conformance.model_adapter import Adapter

pytestmark = pytest.mark.internal

TODAY = datetime.date(2026, 1, 1)
ENTRY = {"case": "ITER-002-short", "reason": "r", "link": "l", "expires": "2026-02-01"}
MODEL = f"{Adapter.__module__}:{Adapter.__name__}"
CASE = next(case for case in stored_cases() if case.id == "STATE-003-each").to_json()
RESULTS = pathlib.Path(__file__).parents[2] / "conformance" / "results"


def write(tmp_path, content):
    path = tmp_path / "given.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def refused(capsys, *arguments):
    """The one line with which the command refuses its arguments."""
    assert cli.main([*map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def script(*actions):
    return {"script": [{"do": "build"}, *actions]}


def test_every_stored_case_could_be_a_file_of_the_users():
    assert [fault for case in stored_cases() for fault in case_faults(case.to_json())] == []


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is no JSON: Expecting property name"),
        ("[" * 9**5, "is no JSON: maximum recursion depth"),
        ([1], "a case is an object, got [1]"),
        ({}, "a case lacks 'id', 'title', 'cites'"),
        ({"colour": 1}, "a case has no 'colour', but 'id', 'title'"),
        ({"basic": 1}, "'basic' of a case is true or false, got 1"),
        ({"id": "../evil"}, "the id '../evil' has other characters than letters"),
        ({"cites": []}, "'cites' is empty"),
        ({"cites": ["STATE-003"]}, "a citation is like 'ITER-004@1', got 'STATE-003'"),
        ({"needs": ["STATE-999"]}, "there is no requirement 'STATE-999'"),
        ({"profiles": []}, "'profiles' is empty"),
        ({"profiles": ["itr"]}, "there is no profile 'itr', but step, iter"),
        ({"program": {}}, "a program lacks 'columns', 'batch_size', 'last_batch'"),
        (
            {"program": {**CASE["program"], "columns": {"id": {"dtype": "int33"}}}},
            "the column 'id' cannot be read: TypeError: data type 'int33' not understood",
        ),
        (
            {"program": {**CASE["program"], "nodes": {"a": 3}}},
            "the operation of the node 'a' is a text, got 3",
        ),
        ({"program": {**CASE["program"], "options": 3}}, "'options' of a program is an object"),
        ({"script": []}, "'script' is empty"),
        ({"script": [3]}, "action 1: an action has a 'do', got 3"),
        (script({"do": "jump"}), "action 2: there is no action 'jump'"),
        (script({"do": "step", "m": 1}), "'step': got an unexpected keyword argument 'm'"),
        (script({"do": "save"}), "action 2: 'save': missing a required argument: 'to'"),
        (script({"do": "build", "size": 3}), "action 2: a program has no 'size'"),
        (script({"do": "restore", "origin": "s"}), "action 2: no state is called 's' so far"),
        (script({"do": "for", "expect": 3}), "action 2: 'expect' is an object, got 3"),
        (script({"do": "for", "expect": {}}), "action 2: 'expect' has one of 'value', 'error'"),
        (script({"do": "for", "expect": {"value": [], "x": 1}}), "action 2: 'expect' has no 'x'"),
        (script({"do": "for", "expect": {"any": []}}), "'any' is a list of expectations, got []"),
        (script({"do": "for", "expect": {"check": "x"}}), "there is no check 'x', but no_error"),
        (
            script({"do": "for", "expect": {"all": [{"check": "permutation"}]}}),
            "action 2: the check 'permutation': missing a required argument: 'length'",
        ),
        (
            script({"do": "for", "expect": {"check": "same_order", "like": "one"}}),
            "action 2: no answer is called 'one' so far",
        ),
    ],
)
def test_a_case_that_is_none_is_refused(tmp_path, content, said):
    if isinstance(content, dict) and content:
        content = {**CASE, **content}
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{re.escape(said)}"):
        load_own(path)


def test_a_case_of_the_users_is_refused_in_one_line(tmp_path, capsys):
    path = write(tmp_path, {})
    assert f"{path} is no case: " in refused(capsys, "run", MODEL, "--case", path)


@pytest.mark.parametrize(
    "content, said",
    [
        (3, "is no list of known failures, but 3"),
        ({}, "is no list of known failures, but {}"),
        ([1], "must give case, reason, link, expires: a known failure is an object, got 1"),
        ([{"case": "x"}], "must give case, reason, link, expires: a known failure lacks 'reason'"),
        ([{**ENTRY, "link": ""}], "must give case, reason, link, expires: 'link' is empty"),
        ([{**ENTRY, "expires": 20300101}], "'expires' of a known failure is a text, got 20300101"),
        ([{**ENTRY, "expires": "soon"}], "expires on a day like 2030-01-31, not 'soon'"),
        ([{**ENTRY, "expires": "2030-02-31"}], "expires on 2030-02-31: day is out of range"),
        ([{**ENTRY, "expires": "2025-12-31"}], "(ITER-002-short) expired on 2025-12-31: fix the"),
        ([{**ENTRY, "case": "ITER-999-none"}], "names 'ITER-999-none', which is no case of this"),
        ([ENTRY, ENTRY], "Expected failure 2 of {} names 'ITER-002-short' a second time"),
    ],
)
def test_an_expected_failure_is_complete_known_and_in_time(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=re.escape(said.replace("of {}", f"of {path}"))) as caught:
        expected_failures(path, stored_cases(), TODAY)
    assert str(path) in str(caught.value)


def test_failures_may_be_listed_in_several_files(tmp_path, capsys):
    names = ["ITER-002-short", "STEP-001-one-row"]
    asked = ["run", MODEL, "--in-process"]
    for name in names:
        entry = {**ENTRY, "case": name, "expires": "9999-12-31"}
        (tmp_path / name).write_text(json.dumps([entry]))
        asked += ["--case", name, "--expected-failures", str(tmp_path / name)]
    assert cli.main(asked) == 1
    assert re.findall(r"^XPASS ([\w-]+)", capsys.readouterr().out, re.M) == names


@pytest.mark.parametrize(
    "content, said",
    [
        ("[", "is no JSON: Expecting value"),
        ({"a": 1}, "is no report: a report lacks 'suite', 'spec', 'engine'"),
        ({"verdicts": [{}]}, "is no report: KeyError: 'cites'"),
        ({"engine": {}}, "is no report: KeyError: 'name'"),
    ],
)
def test_a_matrix_is_made_of_reports(tmp_path, capsys, content, said):
    report = json.loads((RESULTS / "model" / "report.json").read_text())
    if isinstance(content, dict) and "a" not in content:
        content = {**report, **content}
    path = write(tmp_path, content)
    assert f"{path} {said}" in refused(capsys, "matrix", path)


def test_a_report_is_read_as_it_was_written(tmp_path):
    result = run_conformance(Adapter(), only=["STEP-001"])
    assert load_report(write(tmp_path, result)) == result
