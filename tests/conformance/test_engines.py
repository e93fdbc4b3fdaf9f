"""The reports that are committed can be made again, and a difference is seen."""

import importlib.util
import json
import pathlib
import shlex
import shutil
import sys
import tomllib

import pytest
from datarax_conformance.api import arguments_of
from datarax_conformance.cli import parser

CONFORMANCE = pathlib.Path(__file__).parents[2] / "conformance"
pytestmark = pytest.mark.internal


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """conformance/engines.py over a copy of the reports, with no environment made yet."""
    spec = importlib.util.spec_from_file_location("engines_tested", CONFORMANCE / "engines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("src", "adapters"):
        (tmp_path / name).symlink_to(CONFORMANCE / name)
    shutil.copytree(CONFORMANCE / "results" / "model", tmp_path / "results" / "model")
    monkeypatch.setattr(module, "HOME", tmp_path)
    return module


def test_a_report_that_is_not_as_committed_is_seen(engines, tmp_path, capsys, monkeypatch):
    run, made = engines.run, tmp_path / "made"

    def run_once(name, out):
        if not made.exists():
            run(name, made)
        shutil.copytree(made, out)

    monkeypatch.setattr(engines, "run", run_once)
    assert engines.check(["model"]) == 0
    assert capsys.readouterr().out == "model: as committed\n"
    report = tmp_path / "results" / "model" / "report.json"
    report.write_text(report.read_text().replace("PASS", "FAIL", 1))
    assert engines.check(["model"]) == 1
    assert capsys.readouterr().out == "model: differs from conformance/results\n"


def test_the_lines_of_a_failure_are_not_compared(engines, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"verdicts": [{"case": "a", "trace": "x.py:3"}, {"case": "b"}]}))
    assert json.loads(engines.without_traces(path)) == {"verdicts": [{"case": "a"}, {"case": "b"}]}


def test_an_engine_that_cannot_be_installed_is_passed_over(engines, capsys):
    engines.ENGINES["grain"]["python"] = "2.0"
    assert engines.check(["grain"]) == 0
    assert capsys.readouterr().out == (
        "grain: not checked, since it cannot be installed here: There is no Python 2.0 here.\n"
    )


def test_the_page_shows_the_committed_reports(engines, monkeypatch):
    monkeypatch.setattr(engines, "HOME", CONFORMANCE)
    page = CONFORMANCE.parent / "docs" / "conformance" / "results.md"
    assert page.read_text() == engines.page(), "run `python conformance/engines.py page`"


def test_a_replay_names_the_environment_of_its_engine():
    for name, engine in tomllib.loads(
        (CONFORMANCE / "adapters" / "engines.toml").read_text()
    ).items():
        report = json.loads((CONFORMANCE / "results" / name / "report.json").read_text())
        where = f" --python .engines/{name}/bin/python" if "requirements" in engine else ""
        for entry in report["verdicts"]:
            line = f"datarax-conformance run {engine['adapter']}{where} --case {entry['case']}"
            assert entry.get("replay", line) == line


@pytest.mark.parametrize(
    "adapter, how, said",
    [
        ("a.py:A", {}, "a.py:A"),
        ("a.py:A", {"python": "b/python"}, "a.py:A --python b/python"),
        ("a", {"command": ["./engine", "a b"]}, """a --exec './engine '"'"'a b'"'"''"""),
    ],
)
def test_a_replay_drives_the_same_engine(adapter, how, said):
    told = arguments_of(adapter, **{"python": sys.executable, "command": (), **how})
    assert told == said
    [first, *rest] = shlex.split(told)
    asked = parser().parse_args(["run", first, *rest])
    assert shlex.split(asked.exec or "") == how.get("command", [])
    assert asked.python == how.get("python", sys.executable)
