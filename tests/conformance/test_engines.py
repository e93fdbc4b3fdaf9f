"""The reports that are committed can be made again, and a difference is seen."""

import importlib.util
import pathlib
import shutil

import pytest

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


def test_a_report_that_is_not_as_committed_is_seen(engines, tmp_path, capsys):
    assert engines.check(["model"]) == 0
    assert capsys.readouterr().out == "model: as committed\n"
    report = tmp_path / "results" / "model" / "report.json"
    report.write_text(report.read_text().replace("PASS", "FAIL", 1))
    assert engines.check(["model"]) == 1
    assert capsys.readouterr().out == "model: differs from conformance/results\n"


def test_an_engine_that_cannot_be_installed_is_passed_over(engines, capsys):
    engines.ENGINES["grain"]["python"] = "2.0"
    assert engines.check(["grain"]) == 0
    assert capsys.readouterr().out == (
        "grain: not checked, since it cannot be installed here: There is no Python 2.0 here.\n"
    )
