"""Verdicts: what is blocked, what is expected to fail, and that they come out the same."""

import dataclasses
import datetime
import itertools
import json
import pathlib
import re
import shlex
import sys
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest
from datarax_conformance import cli, report, run_conformance
from datarax_conformance.arrays import encode
from datarax_conformance.case import stored_cases
from datarax_conformance.compare import deviation, difference
from datarax_conformance.files import expected_failures
from datarax_conformance.model_adapter import Adapter

pytestmark = pytest.mark.internal

TODAY = datetime.date(2026, 1, 1)
ENTRY = {"case": "ITER-002-short", "reason": "r", "link": "l", "expires": "2026-02-01"}


class NoEpochs(Adapter):
    """Every loop starts its epoch anew."""

    def build(self, program, ops):
        stream = super().build(program, ops)
        step = stream.take

        def take(stay):
            batch = step(stay)
            if not stay:
                raise RuntimeError("no step")
            return batch

        stream.take = take
        return stream


def test_a_broken_step_fails_once_and_blocks_the_rest():
    summary = run_conformance(NoEpochs(), only=["step", "iter"])["summary"]
    assert summary["FAIL"] <= 3
    assert summary["BLOCKED"] > 20


def write(tmp_path, *entries):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_part_of_the_cases_is_no_whole_run(tmp_path):
    result = run_conformance(Adapter(), only=["ITER-002"])
    assert result["partial"] and "a part of the cases only" in report.to_text(result)
    assert "partial run" in report.to_badge(result) and "#2e7d32" not in report.to_badge(result)
    assert "<br>partial run</th>" in report.to_html([result])


def test_texts_of_an_engine_may_hold_anything(tmp_path, capsys):
    class Odd(Adapter):
        def build(self, program, ops):
            raise RuntimeError("\x1b[31mred\x00 \ud800")

    result = run_conformance(Odd(), only=["ITER-002"])
    report.write_report(result, tmp_path)
    ElementTree.parse(tmp_path / "junit.xml")
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read["summary"] == result["summary"]


def test_a_mask_that_is_no_boolean_for_each_row_is_named():
    def answer(**fields):
        return {"value": [{name: encode(np.asarray(x)) for name, x in fields.items()}]}

    ids = np.arange(3, dtype=np.int32)
    expect = {"check": "permutation", "length": 2}
    assert deviation(expect, answer(id=ids, mask=[True, True, False]), {}) is None
    reason = deviation(expect, answer(id=ids, mask=np.array([1, 1, 0])), {})
    assert reason == "mask: expected bool(3,), got int64(3,)"
    reason = deviation(expect, answer(id=ids, mask=[True]), {})
    assert reason == "mask: expected bool(3,), got bool(1,)"


def test_an_unexpected_pass_is_an_error(tmp_path):
    expected = expected_failures(write(tmp_path, ENTRY), stored_cases(), TODAY)
    result = run_conformance(Adapter(), only=["ITER-002"], expected=expected)
    assert result["summary"]["XPASS"] == 1
    assert report.failed(result)
    assert "it is listed as a known failure, but passes: remove the entry" in report.to_text(result)
    report.write_report(result, tmp_path)


NOTHING = {"*": "it has nothing"}
LIMITS = {"last_batch pad": "it has no mask"}


class Limited(Adapter):
    """Says what it has not, in a profile that it claims."""

    limits = LIMITS

    def build(self, program, ops):
        if program.last_batch == "pad":
            raise RuntimeError("no mask")
        return super().build(program, ops)


def test_what_an_adapter_says_cannot_be_asked_is_neither_failed_nor_passed():
    result = run_conformance(Limited(), only=["ITER-005", "ITER-001"])
    assert set(result["summary"]) == {"PASS", "UNSUPPORTED"}
    verdicts = {entry["case"]: entry for entry in result["verdicts"]}
    assert verdicts["ITER-001-one-epoch"]["outcome"] == "PASS"
    assert verdicts["ITER-005-filled"]["reason"] == "last_batch pad: it has no mask"
    assert result["engine"]["limits"] == LIMITS
    assert not report.failed(result)


class Holding(Adapter):
    """An engine that wants its columns as arrays, in one of the ways in which that can fail."""

    def __init__(self, hold):
        self.hold = hold

    def build(self, program, ops):
        for column in program.columns.values():
            self.hold(column)
        return super().build(program, ops)


def wrapped(column):
    try:
        return np.asarray(column)
    except TypeError as exc:
        raise RuntimeError("a bad column") from exc


@pytest.mark.parametrize("hold", [np.asarray, wrapped, lambda x: x.copy(), lambda x: x + 1])
def test_an_engine_that_holds_its_columns_is_not_asked_for_more_than_fit(hold):
    result = run_conformance(Holding(hold), only=["SHUF-010-n1000000000", "ITER-001-one-epoch"])
    verdicts = {entry["case"]: entry for entry in result["verdicts"]}
    assert verdicts["ITER-001-one-epoch"]["outcome"] == "PASS"
    assert verdicts["SHUF-010-n1000000000"]["outcome"] == "UNSUPPORTED"
    assert "in memory" in verdicts["SHUF-010-n1000000000"]["reason"]


def test_no_other_case_is_excused_by_what_an_error_says():
    class Pretends(Adapter):
        def build(self, program, ops):
            raise RuntimeError("not to be held in memory")

    assert run_conformance(Pretends(), only=["ITER-001-one-epoch"])["summary"] == {"FAIL": 1}


def test_an_object_is_not_asked_what_needs_another_process():
    names = ["ITER-001-one-epoch", "SHUF-003"]
    verdicts = run_conformance(Adapter(), only=names)["verdicts"]
    [restarted] = [entry for entry in verdicts if entry["outcome"] == "UNSUPPORTED"]
    assert "needs another process: name the adapter" in restarted["reason"]
    named = "datarax_conformance.model_adapter:Adapter"
    assert run_conformance(named, only=names)["summary"] == {"PASS": len(verdicts)}


@pytest.mark.parametrize(
    "expected, got, found",
    [
        ([0.0, 1.0], [-0.0, 1.0], "x.data[0]: expected 0.0, got -0.0"),
        ([np.nan, -0.0], [-np.nan, -0.0], None),
        ([np.nan, -0.0], [np.nan, 0.0], "x.data[1]: expected -0.0, got 0.0"),
        ([np.nan, 1.0], [1.0, np.nan], "x.data[0]: expected nan, got 1.0"),
    ],
)
def test_floats_are_compared_as_numbers_and_zeros_have_a_sign(expected, got, found):
    expected, got = (np.array(x, np.float32) for x in (expected, got))
    assert difference({"x": encode(expected)}, {"x": encode(got)}) == found


def test_an_engine_that_fails_for_another_reason_has_failed():
    case = "SHUF-010-n1000000000"
    result = run_conformance(Holding(lambda column: len(column) / 0), only=[case])
    assert result["summary"] == {"FAIL": 1}


@pytest.mark.parametrize(
    "claim, only, said",
    [
        ({"limits": NOTHING}, ["scan"], "\nnone of the cases of scan passed, which is claimed\n"),
        ({"limits": NOTHING}, ["SCAN-001"], "\nno case was judged\n"),
        ({"capabilities": ["iter", "shuffle.exact"]}, ["SHUF-012"], "\n  shuffle.exact  no case: "),
        ({"capabilities": ["step"]}, ["ITER-001"], "\nno case was judged: those chosen are of pr"),
    ],
)
def test_a_run_that_shows_nothing_has_failed(monkeypatch, claim, only, said):
    for name, value in claim.items():
        monkeypatch.setattr(Limited, name, value)
    result = run_conformance(Limited(), only=only)
    assert report.failed(result)
    assert said in report.to_text(result)
    assert "#2e7d32" not in report.to_badge(result)  # the green of all that is claimed


@pytest.mark.parametrize(
    "claim, said",
    [
        ({"capabilities": ["itr"]}, "'itr' in `capabilities` is no profile; there are step,"),
        ({"capabilities": []}, "`capabilities` is empty"),
        ({"spec": "0.2"}, "it follows spec '0.2'"),
        ({"limits": {"teleport": "no"}}, "the limit 'teleport' names nothing"),
        ({"limits": {"build": "no"}}, "the limit 'build' names nothing"),
        ({"limits": {"for": "no"}}, "the limit 'for' names nothing"),
        ({"limits": {"last_batch pad": ""}}, "the limit 'last_batch pad' gives no reason"),
        ({"limits": ["records *"]}, "`limits` gives a reason for each feature, as a text, got ['"),
        (
            {"limits": {"records *": 3}},
            "`limits` gives a reason for each feature, as a text, got {",
        ),
        ({"limits": None}, "`limits` gives a reason for each feature, as a text, got None"),
        ({"capabilities": "iter"}, "`capabilities` is a set of profiles, as texts, got 'iter'"),
        ({"capabilities": None}, "`capabilities` is a set of profiles, as texts, got None"),
        ({"capabilities": [["iter"]]}, "`capabilities` is a set of profiles, as texts, got [['i"),
        ({"name": None}, "`name` is a text, got None"),
        ({"version": 1}, "`version` is a text, got 1"),
    ],
)
def test_what_an_adapter_says_of_itself_must_make_sense(monkeypatch, claim, said):
    for name, value in claim.items():
        monkeypatch.setattr(Limited, name, value)
    with pytest.raises(ValueError, match="The adapter cannot be run") as caught:
        run_conformance(Limited(), only=["ITER-001"])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "how, said",
    [
        ({"timeout": -1}, "The timeout is a number of seconds above 0, got -1."),
        ({"timeout": float("nan")}, "The timeout is a number of seconds above 0, got nan."),
        ({"timeout": float("inf")}, "The timeout is a number of seconds above 0, got inf."),
        ({"jobs": 0}, "There is at least 1 job, got 0."),
        ({"only": "iter"}, "The names of cases are a list, got 'iter'."),
    ],
)
def test_what_a_run_cannot_do_is_refused(how, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        run_conformance(Adapter(), **how)


def test_the_digest_does_not_depend_on_the_order_of_the_run():
    digests = {
        run_conformance(Adapter(), only=["ITER-001", "ITER-009"], shuffle=seed)["digest"]
        for seed in range(2)
    }
    assert len(digests) == 1


class Recorded(Adapter):
    """Remembers the programs that it was asked for."""

    def __init__(self):
        self.programs = []

    def build(self, program, ops):
        self.programs.append({**program.to_json(), "seed": None})
        return super().build(program, ops)


def run_order(**how):
    """The programs of plain cases of loops, in the order in which an engine meets them."""
    adapter = Recorded()
    plain = [{"do": "build"}]
    cases = [
        case
        for case in stored_cases()
        if case.profiles[0] == "iter" and [a for a in case.script if a["do"] == "build"] == plain
    ]
    run_conformance(adapter, cases=cases, blocking=False, **how)
    return [json.dumps(program, sort_keys=True) for program in adapter.programs]


def test_equal_programs_are_met_one_after_the_other():
    order = run_order()
    assert len(order) > len(set(order)) == len(list(itertools.groupby(order)))


def test_shuffled_cases_are_met_in_that_order():
    one, other = run_order(shuffle=1), run_order(shuffle=2)
    assert one != other
    assert len(set(one)) < len(list(itertools.groupby(one)))


SHARING = """
import json, os, sys
shared = os.environ["DATARAX_CONFORMANCE_SHARED"]
for line in sys.stdin:
    mine = os.path.join(shared, str(os.getpid()))
    open(mine, "w").close()
    answer = {"name": shared, "version": "1", "spec": "0.1", "capabilities": ["resume"]}
    answer = answer if "hello" in line else sorted(os.listdir(shared))
    print(json.dumps({"value": answer}), flush=True)
"""


def test_processes_of_a_run_share_a_folder_that_ends_with_it(tmp_path):
    (tmp_path / "engine.py").write_text(SHARING)
    command = [sys.executable, str(tmp_path / "engine.py")]
    script = [{"do": "build"}, {"do": "restart"}, {"do": "build", "expect": {"value": []}}]
    case = dataclasses.replace(stored_cases()[0], profiles=["resume"], script=script)
    result = run_conformance("x", cases=[case], command=command)
    assert len(result["verdicts"][0]["got"]["value"]) == 2  # the process before, and this one
    assert not pathlib.Path(result["engine"]["name"]).exists()


def test_the_file_of_a_case_is_run_besides_those_that_are_named(tmp_path, capsys):
    case = next(case for case in stored_cases() if case.id == "STEP-001-one-row")
    own = dataclasses.replace(case, id="STEP-001-own").to_json()
    (tmp_path / "own.json").write_text(json.dumps(own))
    names = ["--case", str(tmp_path / "own.json"), "--case", "ITER-003"]
    adapter = f"{Adapter.__module__}:{Adapter.__name__}"
    assert cli.main(["run", adapter, "--in-process", *names]) == 0
    text = capsys.readouterr().out
    assert "step  1 PASS" in text and "iter  2 PASS" in text


def test_a_failure_alone_does_not_say_that_nothing_of_its_profile_passes():
    result = run_conformance(NoEpochs(), only=["STEP-001-first-batches"])
    assert result["profiles"] == {"step": {"FAIL": 1}}
    assert "none of the cases" not in report.to_text(result)


def test_a_failure_says_everything():
    result = run_conformance(NoEpochs(), only=["STEP-001"])
    text = report.to_text(result)
    for part in (
        "FAIL STEP-001-first-batches",
        "MUST return the next `batch_size` records",
        "20-step.md#STEP-001",
        "case:     {",
        "expected: {",
        "got:      {",
        "replay:   datarax-conformance run",
    ):
        assert part in text


BROKEN = """
from datarax_conformance.model_adapter import Adapter as Model


class Adapter(Model):
    def build(self, program, ops):
        raise RuntimeError("no")
"""


@pytest.mark.parametrize("how", [[], ["--in-process"]])
def test_a_replay_takes_the_adapter_and_the_case_as_they_were_typed(tmp_path, capsys, how):
    (tmp_path / "my adapter.py").write_text(BROKEN)
    case = next(case for case in stored_cases() if case.id == "STEP-001-one-row")
    own = dataclasses.replace(case, id="STEP-001-own").to_json()
    (tmp_path / "own case.json").write_text(json.dumps(own))
    chosen = ["--case", str(tmp_path / "own case.json"), "--case", "STEP-001-one-row"]
    typed = ["run", f"{tmp_path / 'my adapter.py'}:Adapter", *how]
    assert cli.main([*typed, *chosen]) == 1
    lines = re.findall("replay:   datarax-conformance (.*)", capsys.readouterr().out)
    assert [shlex.split(line) for line in lines] == [[*typed, *chosen[2:]], [*typed, *chosen[:2]]]
    assert cli.main(shlex.split(lines[1])) == 1
    assert "FAIL STEP-001-own" in capsys.readouterr().out


def test_what_was_not_judged_says_why():
    result = run_conformance(NoEpochs(), only=["STEP-001", "STEP-003"])
    assert re.search("BLOCKED, needs STEP-001: .*STEP-003-", report.to_text(result))
    cell = report.to_html([result]).partition('<tr id="STEP-003">')[2].partition("</tr>")[0]
    assert "<summary>BLOCKED 0/" in cell
    assert "<li>BLOCKED, needs STEP-001: STEP-003-" in cell
    result = run_conformance(Limited(), only=["ITER-005-filled"])
    assert "UNSUPPORTED, last_batch pad: it has no mask: ITER-005-filled" in report.to_text(result)


def entry_of(outcome, number):
    why = {} if outcome == "PASS" else {"reason": "r"}
    failed = {"replay": "again"} if outcome == "FAIL" else {}
    return {
        "case": f"ITER-001-{number}",
        "cites": ["ITER-001@1"],
        "outcome": outcome,
        **why,
        **failed,
    }


@pytest.mark.parametrize(
    "outcomes, said, counts",
    [
        (["FAIL", "PASS", "PASS", "PASS"], "FAIL 3/4", "1 failed, 3 passed"),
        (
            ["FAIL", "BLOCKED", "PASS", "UNSUPPORTED"],
            "FAIL 1/4",
            "1 failed, 1 passed, 2 not judged",
        ),
        (["UNSUPPORTED", "PASS"], "UNSUPPORTED 1/2", "1 passed, 1 not judged"),
    ],
)
def test_a_cell_of_the_matrix_counts_what_failed_passed_and_was_not_judged(outcomes, said, counts):
    verdicts = [entry_of(outcome, number) for number, outcome in enumerate(outcomes)]
    engine = {"name": "e", "version": "1"}
    profiles = {"iter": Counter(outcomes)}
    page = report.to_html([{"engine": engine, "verdicts": verdicts, "profiles": profiles}])
    assert f'<tr><th>iter</th>\n<td class="{outcomes[0].lower()}">{said}</td>' in page
    assert f"<summary>{said}</summary><ul><li>{counts}</li>" in page


class Narrowing(Adapter):
    """Cuts what does not fit into 32 bits."""

    def build(self, program, ops):
        columns = {name: column.astype(np.int32) for name, column in program.columns.items()}
        return super().build(dataclasses.replace(program, columns=columns), ops)


def test_a_program_that_should_have_been_refused_is_said_so():
    result = run_conformance(Narrowing(), only=["SRC-005-above"])
    [entry] = result["verdicts"]
    assert "expected that the program had been refused when it was built" in entry["reason"]
