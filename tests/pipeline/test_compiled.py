"""What XLA makes of a pipeline: read from the programs that it really compiles."""

import collections
import dataclasses
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from datarax import Pipeline
from datarax._order import FMIX32, ROUNDS
from datarax._rows import Cut
from datarax.operators import Element, ElementOperator, ElementOperatorConfig
from datarax.pipeline._orders import order_program
from datarax.pipeline._program import batch_program
from datarax.sources import MemorySource, MemorySourceConfig

LENGTH, BATCH, BATCHES, WIDTH = 1000, 13, 16, 7

PROGRAM = f"""
import numpy as np
from flax import nnx
from datarax import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig

def use_the_batch(batch):
    return batch["x"].sum()

data = {{"x": np.zeros(({LENGTH}, {WIDTH}), np.float32)}}
source = MemorySource(MemorySourceConfig(shuffle=True), data)
Pipeline(source=source, batch_size={BATCH}, rngs=nnx.Rngs(0)).scan(use_the_batch, {BATCHES})
"""


@dataclasses.dataclass
class Operation:
    name: str
    shape: tuple[int, ...]
    code: str
    text: str

    def computations(self, attribute: str) -> list[str]:
        """The computations that it runs under that attribute."""
        found = re.search(rf"\b{attribute}=(?:{{([^}}]*)}}|%([\w.-]+))", self.text)
        return re.findall(r"[\w.-]+", found[1] or found[2]) if found else []

    @property
    def trips(self) -> int | None:
        """Of a loop: how often it runs, if that is known when it is compiled."""
        found = re.search(r'"known_trip_count":{"n":"(\d+)"}', self.text)
        return int(found[1]) if found else None


class Hlo:
    """The computations of an optimised module, in XLA's textual form."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.entry = operations = None
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.-]+) \(.*{$", line):
                operations = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif operations is not None and (
                found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)", line)
            ):
                name, kind, code, rest = found.groups()
                size = re.match(r"\w+\[([\d,]*)\]", kind)
                shape = tuple(map(int, filter(None, size[1].split(",")))) if size else ()
                operations.append(Operation(name, shape, code, rest))

    def visit(
        self,
        name: str | None = None,
        times: int = 1,
        fused_into: Operation | None = None,
        branch: int | None = None,
    ):
        """Every operation that runs, how often, and the fusion that it is part of, if any.

        Where the program branches, all branches are visited, or the one of that number.
        """
        for operation in self.computations[name or self.entry]:
            yield operation, times, fused_into
            inner = fused_into or (operation if operation.code == "fusion" else None)
            for attribute in ("calls", "to_apply", "branch_computations", "body", "condition"):
                called = operation.computations(attribute)
                if attribute == "branch_computations" and called and branch is not None:
                    called = [called[branch]]
                trips = operation.trips or 1 if attribute == "body" else 1
                for name in called:
                    yield from self.visit(name, times * trips, inner, branch)


@pytest.fixture(scope="module")
def scan_hlo(tmp_path_factory) -> Hlo:
    folder = tmp_path_factory.mktemp("hlo")
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True)
    found = [
        hlo
        for path in folder.glob("*after_optimizations.txt")
        for hlo in [Hlo(path.read_text())]
        if any(operation.trips == BATCHES for operation, *_ in hlo.visit())
    ]
    assert len(found) == 1, "The scan is not one compiled program."
    return found[0]


@pytest.mark.internal("an accelerator would wait on the host at every trip")
def test_no_loop_of_a_shuffled_scan_depends_on_data(scan_hlo: Hlo):
    loops = [operation for operation, *_ in scan_hlo.visit() if operation.code == "while"]
    assert loops
    assert [loop.name for loop in loops if loop.trips is None] == []


@pytest.mark.internal("fused into the gather, an order is computed again for every element")
@pytest.mark.parametrize("branch", [0, 1], ids=["across epochs", "within one"])
def test_an_order_is_computed_once_a_row(scan_hlo: Hlo, branch: int):
    factor = FMIX32[0][1]  # each round of each row multiplies by it exactly once
    constants = {
        operation.name
        for operation, *_ in scan_hlo.visit()
        if operation.code == "constant" and operation.text.startswith(f"{factor})")
    }
    rounds = 0
    for operation, times, fusion in scan_hlo.visit(branch=branch):
        if operation.code == "broadcast" and _operands(operation) & constants:
            constants.add(operation.name)
        elif operation.code == "multiply" and _operands(operation) & constants:
            rounds += times * math.prod((fusion or operation).shape)
    assert rounds == ROUNDS * BATCH * BATCHES


def crop(element: Element, key) -> Element:
    top, left = jax.random.randint(key, (2,), 0, 3)
    image = jax.lax.dynamic_slice(element.data["image"], (top, left), (8, 8))
    return element.update_data({"image": image})


def flip(element: Element, key) -> Element:
    image = element.data["image"]
    image = jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
    return element.update_data({"image": image})


@pytest.mark.internal("fused into what reads it twice, a crop is computed twice for every element")
def test_what_a_stage_has_drawn_is_computed_once():
    data = {"image": np.zeros((12, 10, 10), np.uint8)}
    stages = [ElementOperator(ElementOperatorConfig(stochastic=True), fn=x) for x in (crop, flip)]
    source = MemorySource(MemorySourceConfig(), data)
    stream = Pipeline(source=source, stages=stages, batch_size=6, rngs=nnx.Rngs(0))
    runtime = stream._runtime
    binding = runtime.look(stream)
    structure, values = binding.structure, binding.read()
    program = batch_program(structure, Cut(6, 1, False), 1, None, False)
    order = order_program(structure, 1)(values, np.uint32(0))
    hlo = Hlo(program._inner.lower(values, order).compile().as_text())
    codes = collections.defaultdict(set)  # of the operations in each loop over elements
    for operation, _, fusion in hlo.visit():
        codes[(fusion or operation).name].add(operation.code)
    assert any("gather" in loop for loop in codes.values())
    assert any("reverse" in loop for loop in codes.values())
    assert [loop for loop in codes.values() if {"gather", "reverse"} <= loop] == []
    program(values, order)
    assert "while" not in program._outer.lower(values, order).as_text()


def _operands(operation: Operation) -> set[str]:
    return set(re.findall(r"%([\w.-]+)", operation.text.partition(")")[0]))
