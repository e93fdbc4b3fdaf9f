"""An engine may hang, die or talk nonsense: its cases get a name for it, and the run goes on."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from datarax_conformance import report, run_conformance
from datarax_conformance.adapter import load_adapter
from datarax_conformance.arrays import canonical, encode, unreadable
from datarax_conformance.case import selected, stored_cases
from datarax_conformance.cli import main
from datarax_conformance.compare import difference
from datarax_conformance.engine import Lost, Piped, received
from datarax_conformance.model_adapter import Adapter
from datarax_conformance.session import to_line

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
    return {name: entry["outcome"] for name, entry in told(tmp_path, trouble, timeout).items()}


def told(tmp_path, trouble, timeout=20.0):
    script = tmp_path / "engine.py"
    script.write_text(textwrap.dedent(ENGINE).replace("TROUBLE", trouble))
    command = [sys.executable, str(script)]
    result = run_conformance("x", cases=CASES, command=command, timeout=timeout, blocking=False)
    return {entry["case"]: entry for entry in result["verdicts"]}


@pytest.mark.parametrize(
    "trouble, outcome",
    [
        ("os._exit(3)", "CRASH"),
        ("time.sleep(60)", "TIMEOUT"),
        ("print('Segmentation fault (just kidding)', flush=True); continue", "ADAPTER-ERROR"),
        ("print('[1, 2]', flush=True); continue", "ADAPTER-ERROR"),
        ("os.write(1, b'\\xff\\n'); continue", "ADAPTER-ERROR"),
        ('os.write(1, b\'{"value": [], "note": "\\xff"}\\n\'); continue', "ADAPTER-ERROR"),
        ("print('{\"value\":' + '[' * 99 + ']' * 99 + '}', flush=True); continue", "ADAPTER-ERROR"),
        ("os.close(1); time.sleep(60)", "CRASH"),
        ("print('[' * 10**5, flush=True); continue", "ADAPTER-ERROR"),
        ("print('{\"value\": []}', flush=True)", "FAIL"),  # two answers
        ("os.fork() and os._exit(0); time.sleep(3600)", "CRASH"),
        ('answer = [{"id": {"dtype": "uint8", "shape": [1], "data": [300]}}]', "FAIL"),
        (
            'print(\'{"error": {"code": "x", "details": null, "type": "", "message": ""}}\','
            " flush=True); continue",
            "ADAPTER-ERROR",
        ),
    ],
)
def test_trouble_has_a_name_and_the_run_goes_on(tmp_path, trouble, outcome):
    slow = outcome == "TIMEOUT" or "fork" in trouble
    found = outcomes(tmp_path, trouble, timeout=3.0 if slow else 20.0)
    assert found["STEP-001-first-batches"] == outcome
    assert found["ITER-001-one-epoch"] == "FAIL"  # it was asked, and answered wrongly


def test_a_line_that_no_action_asked_for_is_said_at_once():
    twice = "import sys\nfor line in sys.stdin: print('{\"value\": 1}\\n5', flush=True)"
    engine = Piped([sys.executable, "-c", twice])
    for check in (engine.check_silent, lambda: engine.execute({"do": "len"}, 20.0)):
        assert engine.execute({"do": "len"}, 20.0) == {"value": 1}
        until = time.monotonic() + 20.0
        while engine.lines.empty() and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(Lost, match=r"a line that no action asked for: '5\\n'"):
            check()
        engine.check_silent()  # the next action starts another process
    engine.close()


def test_the_children_of_an_engine_end_with_it(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "engine.py"
    script.write_text(
        "import os, sys, time\n"
        "sys.stdin.readline()\n"
        "if os.fork():\n"
        "    print('{\"value\": 1}', flush=True)\n"
        "else:\n"
        f"    open({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(3600)\n"
    )
    engine = Piped([sys.executable, str(script)])
    assert engine.execute({"do": "hello"}, 20.0) == {"value": 1}
    until = time.monotonic() + 20.0
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    engine.close()  # the child holds the other end of the pipes
    while is_running(int(pid.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(int(pid.read_text()))


def is_running(pid):
    """Whether there is such a process that is no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_has_left_the_session_does_not_keep_the_run(tmp_path):
    (tmp_path / "engine.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '20'], start_new_session=True)\n"
        "for line in sys.stdin: print('{\"value\": %d}' % child.pid, flush=True)\n"
    )
    engine = Piped([sys.executable, str(tmp_path / "engine.py")])
    child = engine.execute({"do": "begin"}, 20.0)["value"]
    start = time.monotonic()
    engine.close()  # the child holds the other end of the pipes
    assert time.monotonic() - start < 3
    os.kill(child, signal.SIGKILL)


SLOW = """
import json, os, pathlib, sys, time
hello = {"name": "x", "version": "1", "spec": "0.1", "capabilities": ["step", "iter"]}
for line in sys.stdin:
    if "hello" not in line:
        pathlib.Path(str(os.getpid())).touch()
        time.sleep(60)
    print(json.dumps({"value": hello}), flush=True)
"""


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_is_ended_ends_its_engines(tmp_path, sent, code, jobs):
    (tmp_path / "engine.py").write_text(SLOW)
    command = f"{sys.executable} {tmp_path / 'engine.py'}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    asked = ["datarax_conformance", "run", "x", "--exec", command, "--jobs", jobs]
    run = subprocess.Popen(
        [sys.executable, "-m", *asked], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    start = time.monotonic()
    while not (busy := [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]):
        assert time.monotonic() - start < 30
        time.sleep(0.05)
    run.send_signal(sent)
    _, said = run.communicate(timeout=30)
    assert run.returncode == code
    assert "Traceback" not in said
    for process in busy:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_an_engine_that_does_not_read_has_its_time_and_no_more():
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    engine = Piped(command)
    action = {"do": "begin", "program": "x" * 2**20}  # more than a pipe holds
    try:
        with pytest.raises(Lost, match="no answer to 'begin' in time"):
            engine.execute(action, 0.5)
    finally:
        engine.close()


@pytest.mark.parametrize("dtype, data", [("int32", [0.6]), ("uint8", [1.0]), ("bool", [1])])
def test_a_number_of_another_type_than_it_is_said_to_be_is_not_mended(dtype, data):
    answer = {"dtype": dtype, "shape": [1], "data": data}
    assert canonical(answer) == answer
    assert difference(encode(np.array(data, dtype)), canonical(answer)) is not None


def test_base64_with_other_characters_in_it_is_not_mended():
    answer = encode(np.array([np.inf, 1.0]))
    assert canonical(answer) == answer
    answer["base64"] += "~"
    assert canonical(answer) == answer


ONES = {"dtype": "float32", "shape": [2]}


@pytest.mark.parametrize(
    "array, said",
    [
        ({**ONES, "base64": "AACAPw=="}, "cannot reshape array of size 1 into shape (2,)"),
        ({**ONES, "base64": "AACAPw~="}, "Only base64 data is allowed"),
        ({**ONES, "base64": "AACAPw="}, "Incorrect padding"),
        ({**ONES, "data": ["x", 1]}, "could not convert string to float: 'x'"),
        ({**ONES, "dtype": "int33", "data": [1, 1]}, "data type 'int33' not understood"),
        (ONES, "an array has `data` or `base64`"),
        ({"dtype": "uint8", "shape": [1], "data": [300]}, "300 out of bounds for uint8"),
    ],
)
def test_an_array_that_cannot_be_read_says_where_it_stands_and_why(array, said):
    answer = [{"id": encode(np.arange(2))}, {"id": encode(np.arange(2)), "x": array}]
    assert re.fullmatch(rf"\[1\]\.x: .*{re.escape(said)}.*", str(unreadable(answer)))


@pytest.mark.parametrize(
    "array, outcome, said",
    [
        (
            {**ONES, "shape": [4], "base64": "AACAPw=="},
            "ADAPTER-ERROR",
            "no value of the form that 'step' gives: ",
        ),
        (
            ONES,
            "FAIL",
            "[0].x: expected the names ['data', 'dtype', 'shape'], got ['dtype', 'shape'] (",
        ),
    ],
)
def test_a_report_says_which_array_cannot_be_read(tmp_path, array, outcome, said):
    [case] = [case for case in CASES if case.id == "STEP-001-first-batches"]
    right = case.script[1]["expect"]["value"]
    answer = [{**batch, "x": array} for batch in right]
    entry = told(tmp_path, f"answer = {answer}")[case.id]
    assert entry["outcome"] == outcome
    assert entry["reason"].startswith(f"{said}[0].x: ")


@pytest.mark.parametrize(
    "answer, said",
    [
        ({}, "not an answer, as it has no `value`, `error` or `fault`: '{}'"),
        ({"fault": 3}, "not an answer, as it has no `value`, `error` or `fault`: "),
        ({"error": "x"}, "not an answer, as its `error` is no object: "),
        ({"error": {"code": "x"}}, "not an answer, as its `error` has no `details`, `type`, `me"),
        (
            {"error": {"code": "x", "details": 3, "type": "", "message": ""}},
            "not an answer, as the `details` of its `error` are no object: ",
        ),
    ],
)
def test_what_is_not_an_answer_says_what_it_lacks(answer, said):
    with pytest.raises(Lost, match=re.escape(said)):
        received(json.dumps(answer))


class Mumbling(Adapter):
    """Fails with half of a pair of surrogates in its text."""

    def build(self, program, ops):
        raise RuntimeError("\ud800 and \U0001f642")


def test_half_a_surrogate_is_replaced_where_an_answer_is_received(tmp_path):
    name = "STEP-001-first-batches"
    [local] = run_conformance(Mumbling(), only=[name])["verdicts"]
    assert "? and \U0001f642" in local["reason"]
    error = {"code": "x", "details": {}, "type": "", "message": "\ud800"}
    trouble = f"print({json.dumps({'error': error})!r}, flush=True); continue"
    assert outcomes(tmp_path, trouble)[name] == "FAIL"
    report.write_report(run_conformance(Mumbling(), only=[name]), tmp_path / "out")


def test_an_answer_that_is_no_json_is_an_adapter_error():
    assert to_line({"value": {1, 2}}) == (
        '{"fault": "an answer that JSON cannot hold: Object of type set is not JSON serializable"}'
    )


@pytest.mark.parametrize(
    "asked, cause",
    [
        (["no_such_module:Adapter"], "No module named 'no_such_module'\n"),
        (["json:Adapter"], "module 'json' has no attribute 'Adapter'"),
        (["nofile.py:Adapter"], "No such file or directory"),
        (["no_such_module:Adapter", "--in-process"], "No module named 'no_such_module'"),
        (["x", "--exec", "./no-such-engine"], "cannot start: No such file or directory"),
        (["x", "--exec", ""], "--exec needs a command"),
        (["x", "--exec", "true"], "the process ended with code 0 at 'hello'"),
        (["x", "--exec", "echo 5"], "not an answer: '5"),
    ],
)
def test_what_is_no_engine_at_all_is_said_once(asked, cause, capsys, command="run"):
    assert main([command, *asked]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and cause in shown.err


def test_explore_too_says_it_once(capsys):
    test_what_is_no_engine_at_all_is_said_once(["no.py:A"], "No such file", capsys, "explore")


def test_explore_shows_the_program_at_which_an_engine_dies(tmp_path, capsys):
    (tmp_path / "dying.py").write_text(
        "import os\nfrom datarax_conformance.model_adapter import Adapter as Model\n"
        "class Adapter(Model):\n    def build(self, program, ops): os._exit(3)\n"
    )
    assert main(["explore", f"{tmp_path / 'dying.py'}:Adapter", "--examples", "2"]) == 1
    said = "CRASH: the process ended with code 3 at 'build'\n{\"program\": "
    assert capsys.readouterr().out.startswith(said)


def run_module(*arguments):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=env, capture_output=True, text=True
    )


def run_suite(folder, *arguments):
    """The exit code and the output of the stored cases as tests."""
    plugin = ("pytest", "-p", "datarax_conformance.plugin", "-c", os.devnull, "--rootdir", folder)
    done = run_module(*plugin, "-q", "--pyargs", "datarax_conformance.suite", *arguments)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ([], 4, "The conformance suite needs an engine: --adapter module:Class"),
        (["--adapter", "no_such_module:Adapter"], 2, "No module named 'no_such_module'"),
        (["--adapter", "x:y", "--expected-failures", "none.json"], 2, "No such file or directory"),
    ],
)
def test_pytest_too_says_it_once(tmp_path, arguments, code, said):
    told = run_suite(tmp_path, *arguments)
    assert told[0] == code
    assert told[1].count(said) == 1 and " error" not in told[1]


def test_pytest_too_fails_if_nothing_of_a_profile_passes(tmp_path):
    (tmp_path / "idle.py").write_text(
        "from datarax_conformance.model_adapter import Adapter as Model\n"
        "class Adapter(Model):\n    capabilities = ['scan']\n    limits = {'*': 'nothing'}\n"
    )
    adapter = ("--adapter", f"{tmp_path / 'idle.py'}:Adapter")
    code, told = run_suite(tmp_path, *adapter, "-rN")  # no summary, which would repeat it
    assert code == 1
    assert told.count("none of the cases of scan passed, which is claimed") == 1
    assert run_suite(tmp_path, *adapter, "-k", "SCAN-001")[0] == 0


def test_the_package_is_the_command():
    assert run_module("datarax_conformance", "--help").stdout.startswith(
        "usage: datarax-conformance "
    )
    assert run_module("datarax_conformance", "run", "nothing").returncode == 2


def test_an_adapter_that_is_called_as_its_engine_imports_the_engine(tmp_path, monkeypatch):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (tmp_path / "some_engine.py").write_text("VERSION = '7'\n")
    (folder / "some_engine.py").write_text(
        "import some_engine, neighbour\n"
        "class Adapter:\n    name = neighbour.NAME\n    version = some_engine.VERSION\n"
    )
    (folder / "neighbour.py").write_text("NAME = 'next door'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("some_engine", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    adapter = load_adapter(f"{folder / 'some_engine.py'}:Adapter")
    assert (adapter.name, adapter.version) == ("next door", "7")


class Broken:
    name, version, spec = "broken", "1", "0.1"
    capabilities = frozenset(["step"])

    def build(self, program, ops):
        raise RuntimeError("no")

    def classify(self, exc):
        return exc


def test_a_classify_that_breaks_its_contract_is_an_adapter_error():
    verdict = run_conformance(Broken(), only=["STEP-001"])["verdicts"][0]
    assert verdict["outcome"] == "ADAPTER-ERROR"
    assert "classify returns (code, details)" in verdict["reason"]


FAULTY = """
from datarax_conformance.model_adapter import Adapter as Model


def helper():
    raise RuntimeError("no")


class Adapter(Model):
    def build(self, program, ops):
        helper()

    def classify(self, exc):
        return 1 / 0 if self.strict else ("unclassified", {})

    strict = False
"""


def test_an_exception_shows_the_lines_from_which_it_came(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    adapter = f"{tmp_path / 'faulty.py'}:Adapter"
    result = run_conformance(adapter, only=["STEP-001-first-batches"])
    [entry] = result["verdicts"]
    assert entry["trace"] == (
        '…/faulty.py:11 in build: helper()\n…/faulty.py:6 in helper: raise RuntimeError("no")'
    )
    assert "trace" not in entry["got"]["error"]
    assert "\n    …/faulty.py:11 in build: helper()\n" in report.to_text(result)
    (tmp_path / "faulty.py").write_text(FAULTY.replace("strict = False", "strict = True"))
    [entry] = run_conformance(adapter, only=["STEP-001-first-batches"])["verdicts"]
    assert entry["reason"] == (
        "classify failed: ZeroDivisionError: division by zero: …/faulty.py:14 in classify: "
        'return 1 / 0 if self.strict else ("unclassified", {})'
    )
    (tmp_path / "faulty.py").write_text("x = 1\nx.y\n")
    with pytest.raises(
        ValueError, match=r"has no attribute 'y': …/faulty\.py:2 in <module>: x\.y$"
    ):
        run_conformance(adapter)


def test_a_crash_shows_the_last_words_and_passes_all_on(tmp_path, capfd):
    trouble = "os.write(2, b'one\\ntwo\\n/tmp/there/three\\n4\\n5\\n6'); os._exit(3)"
    entry = told(tmp_path, trouble)["STEP-001-first-batches"]
    assert entry["trace"] == "two\n…/three\n4\n5\n6"
    assert "one\ntwo\n/tmp/there/three\n4\n5\n6" in capfd.readouterr().err


def test_an_object_that_exits_does_not_end_the_run():
    class Leaving(Adapter):
        def build(self, program, ops):
            raise SystemExit(0)

    verdicts = run_conformance(Leaving(), cases=CASES, blocking=False)["verdicts"]
    assert {entry["outcome"] for entry in verdicts} == {"CRASH"}
    assert verdicts[0]["reason"] == "the engine exits with 0 at 'build'"


@pytest.mark.parametrize("details", [None, 3, {"nodes": {1, 2}}])
def test_details_that_are_no_json_are_an_adapter_error(details):
    class Vague(Broken):
        def classify(self, exc):
            return "stage", details

    [verdict] = run_conformance(Vague(), only=["STEP-001-first-batches"])["verdicts"]
    assert verdict["outcome"] == "ADAPTER-ERROR"
    assert "classify returns details that JSON can hold" in verdict["reason"]


@pytest.mark.parametrize("state, kind", [("{}", "str"), ({}, "dict")])
def test_a_state_that_is_no_bytes_is_an_adapter_error(state, kind):
    class Told(Adapter):
        def build(self, program, ops):
            stream = super().build(program, ops)
            stream.get_state = lambda: state
            return stream

    [verdict] = run_conformance(Told(), only=["STATE-003-each"])["verdicts"]
    assert verdict["outcome"] == "ADAPTER-ERROR"
    assert f"get_state returns bytes, got {kind}" in verdict["reason"]
