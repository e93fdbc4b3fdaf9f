"""The guide prints what its description promises."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

GUIDE = Path(__file__).parents[2] / "docs/examples/advanced/dag/01_dag_fundamentals_guide.py"

PRINTED = f"""\
JAX version: {jax.__version__}
Source: 64 samples
Linear pipeline output: image shape=(16, 32, 32, 3)
DAG pipeline output: image shape=(16, 2, 32, 32, 3)
Linear pipeline: 1 stages
DAG pipeline: 3 stages
DAG Pipeline Fundamentals Guide
==================================================
Linear: processed 64 samples
DAG: processed 64 samples
Guide completed successfully!
"""


@pytest.mark.internal
def test_the_guide_prints_its_shapes_and_counts():
    run = subprocess.run([sys.executable, GUIDE], capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout == PRINTED
