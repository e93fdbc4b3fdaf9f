"""The page "Write an adapter in ten minutes", done as it says, in an environment of its own."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.internal,
    pytest.mark.skipif(
        not os.environ.get("CONFORMANCE_SLOW"), reason="installs packages; `make goals` runs it"
    ),
]


def sh(command, folder, **variables):
    done = subprocess.run(
        command,
        cwd=folder,
        shell=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": "", **variables},
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def test_the_page_works_in_a_new_environment(tmp_path):
    home = tmp_path / "home"
    shutil.copytree(
        ROOT / "conformance",
        home / "conformance",
        ignore=lambda _, names: [x for x in names if x.startswith(".") or x == "results"],
    )
    # So that pytest looks for no configuration in the folders above, which are somebody else's.
    (home / "pytest.ini").write_text("[pytest]\n")
    sh(f"{sys.executable} -m venv {tmp_path}/venv", tmp_path)
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    page = (ROOT / "docs" / "conformance" / "adapter.md").read_text()
    commands = [
        line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()
    ]
    start = time.monotonic()
    shown = {
        line: sh(line, home, PATH=path, PIP_DISABLE_PIP_VERSION_CHECK="1") for line in commands
    }
    assert time.monotonic() - start < 600
    told = "\n".join(shown.values())
    assert "my-engine 0" in told
    assert "FAIL ITER-003-whole" in told
    assert "passed" in told and "'PASS'" in told
    assert (home / "report" / "report.json").exists()
    freeze = sh("python -m pip list --format=freeze", home, PATH=path)
    assert not re.search(r"^(jax|flax|datarax)\b(?!-conformance)", freeze, re.M)
