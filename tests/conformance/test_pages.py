"""What the pages for authors of adapters say is so, and what they show works."""

import hashlib
import inspect
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from datarax_conformance import run_conformance
from datarax_conformance.arrays import canonical, encode
from datarax_conformance.case import stored_cases
from datarax_conformance.cli import parser
from datarax_conformance.engine import Local, Piped
from datarax_conformance.report import to_text
from datarax_conformance.runner import BAD, Run
from datarax_conformance.session import Session
from datarax_conformance.template_adapter import Adapter

pytestmark = pytest.mark.internal

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "conformance"
ADAPTER = (DOCS / "adapter.md").read_text()
PROTOCOL = (DOCS / "protocol.md").read_text()


def run_block(page, word):
    """The names that the Python block with this word defines, after those before it."""
    names = {}
    for block in re.findall("```python\n(.*?)```", page, re.S):
        exec(block, names)
        if word in block:
            return names
    raise AssertionError(f"no block has {word!r}")


def test_the_stages_of_the_page_pass():
    counts = run_conformance(run_block(ADAPTER, "StagedAdapter")["StagedAdapter"](), only=["dag"])
    assert set(counts["profiles"]["dag"]) == {"PASS"}
    assert counts["profiles"]["dag"]["PASS"] > 15


def test_the_limits_of_the_page_name_something(monkeypatch):
    [table] = re.findall(r"\| feature \|.*?\n\n", ADAPTER, re.S)
    named = [name for line in table.splitlines()[2:] for name in re.findall("`(.*?)`", line[:90])]
    assert len(named) > 5
    limits = {name: "r" for name in named if name != "jax"}
    monkeypatch.setattr(Adapter, "limits", limits, raising=False)
    assert Run(lambda: Local(Adapter()), stored_cases()).identity["limits"] == limits


def codes_of(expect):
    """The codes of errors in an expectation."""
    parts = [*expect.get("any", ()), *expect.get("all", ())]
    return {code for part in parts for code in codes_of(part)} | {expect.get("error")}


def test_the_codes_that_other_profiles_than_errors_need_are_those_of_the_page():
    needed = {
        (case.profiles[0], code)
        for case in stored_cases()
        if case.profiles[0] not in ("errors", "jax")
        for action in case.script
        for code in codes_of(action.get("expect", {})) - {None, "*", "not-built"}
    }
    assert needed == set(re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", ADAPTER, re.M))


def actions_of_page():
    """Each action in the table of the protocol: its arguments, and which may be left out."""
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\| [^|]+ \| [^|]+ \|$", PROTOCOL, re.M)
    return dict(rows)


def test_every_action_is_on_the_page():
    others = set(
        re.findall("`([a-z_]+)`", PROTOCOL.partition("The other actions")[2].split("##")[0])
    )
    listed = {name.removeprefix("do_") for name in dir(Session) if name.startswith("do_")}
    assert set(actions_of_page()) | others - {"jax"} == listed


def test_the_arguments_are_those_of_the_page():
    for action, text in actions_of_page().items():
        free = re.findall(r"`(\w+)`: ([^,\]]+)", text)
        required = set(re.findall(r"`(\w+)`", text)) - {name for name, _ in free}
        shown = {name: json.loads(value) for name, value in free}
        parameters = [
            p
            for p in inspect.signature(getattr(Session, f"do_{action}")).parameters.values()
            if p.name not in ("self", "way", "form", "edit") and p.kind is not p.VAR_KEYWORD
        ]
        assert {p.name: p.default for p in parameters if p.name not in required} == shown, action
        assert required <= {p.name for p in parameters}, action


def test_what_is_sent_outside_profile_jax_is_on_the_page():
    program = {"columns", "batch_size", "last_batch", "seed", "nodes", "edges", "sink"}
    page = actions_of_page()
    for case in stored_cases():
        if "jax" not in case.profiles:
            assert set(case.program) == program
            for action in case.script:
                sent = set(action) - {"do", "expect", "note", "part"}  # not sent
                if action["do"] != "restart":  # which the suite does itself
                    known = set(re.findall(r"`(\w+)`", page[action["do"]]))
                    assert sent <= known | (program if action["do"] == "build" else set()), case.id


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    [source] = re.findall("```py\n(.*?)```", PROTOCOL, re.S)
    path = tmp_path_factory.mktemp("protocol") / "engine.py"
    path.write_text(source)
    return [sys.executable, "-S", str(path)]


def test_the_engine_of_the_page_passes(engine):
    result = run_conformance("lines", command=engine)
    bad = {e["case"]: e["reason"] for e in result["verdicts"] if e["outcome"] in BAD}
    assert bad == {}
    assert "BLOCKED" not in result["summary"]
    assert result["profiles"]["step"]["PASS"] > 10
    assert result["profiles"]["iter"]["PASS"] > 30


TALK = """
import json, sys
for line in sys.stdin:
    do = json.loads(line)["do"]
    hello = {"name": "x", "version": "1", "spec": "0.1"}
    hello["capabilities"] = ["iter", "shuffle.valid"]
    answers = {"hello": {"value": hello}, "for": ANSWER}
    print(json.dumps(answers.get(do, {"value": None})), flush=True)
"""


@pytest.mark.parametrize(
    "answer, outcome",
    [
        ({"error": {"code": "in-memory", "details": {}, "type": "", "message": ""}}, "UNSUPPORTED"),
        ({"error": {"code": "in-memory"}}, "ADAPTER-ERROR"),
        ({"fault": "mine"}, "ADAPTER-ERROR"),
        ({"fault": ""}, "ADAPTER-ERROR"),
        ({"value": 5}, "ADAPTER-ERROR"),
        ({"value": [{"id": [0, 1]}]}, "ADAPTER-ERROR"),
    ],
)
def test_answers_mean_what_the_page_says(tmp_path, answer, outcome):
    (tmp_path / "engine.py").write_text(f"ANSWER = {answer!r}\n{TALK}")
    command = [sys.executable, str(tmp_path / "engine.py")]
    result = run_conformance("x", command=command, only=["SHUF-010-n1000000000"], blocking=False)
    assert result["summary"] == {outcome: 1}
    assert outcome in to_text(result)


def test_the_page_and_the_help_tell_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["run", "--help"])
    shown = capsys.readouterr().out
    told = dict(re.findall(r"^  (\d)    (.*?)(?=\n  \d|\n\n)", shown, re.M | re.S))
    page = dict(re.findall(r"^\| (\d) \| (.*?)(?:;.*)? \|$", ADAPTER, re.M))
    assert {code: " ".join(said.split()) for code, said in told.items()} == page
    assert set(page) == {"0", "1", "2"}


def test_the_digest_is_made_as_the_page_says():
    result = run_conformance(Adapter(), only=["iter"])
    lines = sorted(f"{entry['case']} {entry['outcome']}\n" for entry in result["verdicts"])
    assert result["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert to_text(result).endswith(f"\ndigest {result['digest'][:16]}")


NARROW = """
import json, sys
hello = {"name": "x", "version": "1", "spec": "0.1", "capabilities": ["iter", "step"]}
refused = {"code": "field-type", "details": {"field": "wide"}, "type": "", "message": ""}
answers = {"hello": {"value": hello}, "begin": {"value": None}, "build": {"error": refused}}
for line in sys.stdin:
    print(json.dumps(answers[json.loads(line)["do"]]), flush=True)
"""


def test_an_engine_that_refuses_a_program_as_it_may_is_asked_nothing_more(tmp_path):
    (tmp_path / "engine.py").write_text(NARROW)
    command = [sys.executable, str(tmp_path / "engine.py")]
    names = ["SRC-005-far", "SRC-005-second-batch", "SRC-005-step", "SRC-006-beyond"]
    result = run_conformance("x", command=command, only=names, blocking=False)
    assert result["summary"] == {"PASS": len(names)}


@pytest.mark.parametrize(
    "written",
    [
        {"dtype": "float32", "shape": [2], "data": [1, 0.1]},
        {"dtype": "float32", "shape": [2], "base64": "AACAP83MzD0="},
    ],
)
def test_an_array_may_be_written_in_either_form(tmp_path, written):
    (tmp_path / "engine.py").write_text(f"ANSWER = {{'value': [{written!r}]}}\n{TALK}")
    pipe = Piped([sys.executable, str(tmp_path / "engine.py")])
    try:
        answer = pipe.execute({"do": "for"}, 20)
    finally:
        pipe.close()
    assert answer == {"value": [encode(np.float32([1, 0.1]))]}


def test_an_array_that_numpy_cannot_hold_is_left_as_it_is():
    answer = {"value": {"dtype": "bfloat15", "shape": [1], "data": [1]}}
    assert canonical(answer) == answer
