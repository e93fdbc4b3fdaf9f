"""An engine may hang, die or talk nonsense: its cases get a name for it, and the run goes on."""

import os
import subprocess
import sys
import textwrap

import pytest
from datarax_conformance import run_conformance
from datarax_conformance.case import selected, stored_cases
from datarax_conformance.cli import main

pytestmark = pytest.mark.internal

CASES = selected(stored_cases(), ["STEP-001", "ITER-001"])

# Answers as an engine without any profile in fault would, until the first action of its choice.
ENGINE = """
import json, os, sys, time
for line in sys.stdin:
    action = json.loads(line)
    if action["do"] == "hello":
        answer = {"name": "x", "version": "1", "spec": "0.1", "capabilities": ["step", "iter"]}
    elif action["do"] == "step":
        TROUBLE
    else:
        answer = [] if action["do"] == "for" else None
    print(json.dumps({"value": answer}), flush=True)
"""


def outcomes(tmp_path, trouble, timeout=20.0):
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(ENGINE).replace("TROUBLE", trouble))
    command = [sys.executable, str(script)]
    report = run_conformance("x", cases=CASES, command=command, timeout=timeout, blocking=False)
    return {entry["case"]: entry["outcome"] for entry in report["verdicts"]}


@pytest.mark.parametrize(
    "trouble, outcome",
    [
        ("os._exit(3)", "CRASH"),
        ("time.sleep(60)", "TIMEOUT"),
        ("print('Segmentation fault (just kidding)', flush=True); continue", "ADAPTER-ERROR"),
        ("print('[1, 2]', flush=True); continue", "ADAPTER-ERROR"),
    ],
)
def test_trouble_has_a_name_and_the_run_goes_on(tmp_path, trouble, outcome):
    found = outcomes(tmp_path, trouble, timeout=3.0 if outcome == "TIMEOUT" else 20.0)
    assert found["STEP-001-first-batches"] == outcome
    assert found["ITER-001-one-epoch"] == "FAIL"  # it was asked, and answered wrongly


@pytest.mark.parametrize(
    "asked, cause",
    [
        (["no_such_module:Adapter"], "No module named 'no_such_module'"),
        (["json:Adapter"], "module 'json' has no attribute 'Adapter'"),
        (["x", "--exec", "./no-such-engine"], "cannot start: No such file or directory"),
        (["x", "--exec", "true"], "the process ended with code 0 at 'hello'"),
        (["x", "--exec", "echo 5"], "not an answer: '5"),
    ],
)
def test_what_is_no_engine_at_all_is_said_once(asked, cause, capsys):
    assert main(["run", *asked]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and cause in shown.err


def run_module(*arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=env, capture_output=True, text=True
    )


def test_pytest_too_says_it_once(tmp_path):
    plugin = ("pytest", "-p", "datarax_conformance.plugin", "-c", os.devnull, "--rootdir", tmp_path)
    suite = ("--pyargs", "datarax_conformance.suite", "--adapter", "no_such_module:Adapter")
    done = run_module(*plugin, *suite)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("No module named 'no_such_module'") == 1


def test_the_package_is_the_command():
    assert run_module("datarax_conformance", "--help").stdout.startswith(
        "usage: datarax-conformance "
    )
    assert run_module("datarax_conformance", "run", "nothing").returncode == 2


class Broken:
    name, version, spec = "broken", "1", "0.1"
    capabilities = frozenset(["step"])

    def build(self, program, ops):
        raise RuntimeError("no")

    def classify(self, exc):
        return exc


def test_a_classify_that_breaks_its_contract_is_an_adapter_error():
    report = run_conformance(Broken(), only=["STEP-001"])
    assert report["verdicts"][0]["outcome"] == "ADAPTER-ERROR"
    assert "classify returns (code, details)" in report["verdicts"][0]["reason"]
