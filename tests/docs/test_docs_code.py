"""Every Python block that a reader can copy is run, from the top of its page to the bottom."""

import inspect
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Affine
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

from datarax import Pipeline, operators, sources

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "conformance" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
SYBIL = Sybil(parsers=[PythonCodeBlockParser()])


@pytest.mark.internal
@jax.numpy_dtype_promotion("standard")  # as a reader has it; optax needs it
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page):
    for example in SYBIL.parse(page).examples():
        example.evaluate()


@pytest.mark.internal
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(
    "documented",
    [
        Pipeline,
        Pipeline.from_dag,
        Pipeline.scan,
        operators.ElementOperator,
        operators.OperatorModule,
    ],
    ids=lambda x: x.__qualname__,
)
def test_the_example_of_a_docstring_runs(documented):
    rows = np.zeros((64, 4, 4, 1), np.float32)
    source = sources.MemorySource(sources.MemorySourceConfig(), {"x": rows, "image": rows})
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    names = {
        "source": source,
        "augment": Affine(2, 1),
        "model": model,
        "optimizer": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param),
        "loss_of": lambda model, batch: model(batch["x"]).sum(),
        "pipeline": Pipeline(source=source, batch_size=32),
    }
    names |= {"jax": jax, "jnp": jnp, "np": np, "nnx": nnx, "Pipeline": Pipeline}
    [code] = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
    exec(textwrap.dedent(code), {**vars(operators), **vars(sources), **names})
