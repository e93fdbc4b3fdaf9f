"""What the library offers beyond the law, over the model: an oracle for cases of profile jax."""

import dataclasses
import threading
from typing import Any

from .model import Batch, EpochIterator, Program, Stream, make_plan


class Library(Stream):
    def __len__(self) -> int:
        size = self.program.batch_size
        whole = self.length // size
        return whole if self.program.last_batch == "drop" else -(-self.length // size)

    def __iter__(self) -> "SharedIterator":
        return SharedIterator(self)

    def jit_steps(self, n: int) -> list[Batch]:
        return [self.step() for _ in range(n)]

    def replace(self, node: str, form: str) -> None:
        """From the next batch on, `node` is another operation."""
        nodes = {**self.program.nodes, node: form}
        self.program = dataclasses.replace(self.program, nodes=nodes)
        self.plan = make_plan(self.program)

    def change(self, node: str, form: str) -> None:
        """From the next batch on, `node` has other parameters."""
        self.replace(node, form)

    def grad(self, node: str) -> Batch:
        """How the sum of the next batch's x changes with the parameters of an affine node.

        Programs are linear in each parameter, so a difference over 1 is the derivative.
        """
        form = self.program.nodes[node]
        a, b = (int(word) for word in form.removeprefix("affine(").rstrip(")").split(","))
        here = self._sum_with(node, form)
        slopes = {
            "a": self._sum_with(node, f"affine({a + 1},{b})") - here,
            "b": self._sum_with(node, f"affine({a},{b + 1})") - here,
        }
        self.replace(node, form)
        return slopes

    def _sum_with(self, node: str, form: str) -> Any:  # a scalar of the field's own type
        self.replace(node, form)
        batch, _, _ = self.next_batch(stay=False)
        return batch["x"].sum(dtype=batch["x"].dtype)


class SharedIterator(EpochIterator):
    """Several threads may take turns at it."""

    lock = threading.RLock()

    def __next__(self) -> Batch:
        with self.lock:
            return super().__next__()


__all__ = ["Library", "Program", "SharedIterator"]
