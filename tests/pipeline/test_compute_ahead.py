"""How many batches are worth computing together."""

import pytest

from datarax.pipeline import _compute_ahead
from datarax.pipeline._program import Program


@pytest.mark.internal
@pytest.mark.parametrize(
    "known, epoch, count",
    [
        ({}, None, 1),  # before it has been called
        ({"seconds": 0.1}, None, 8),
        ({"seconds": 0.7}, None, 2),
        ({"seconds": 2}, None, 1),
        ({"seconds": 9}, None, 1),
        ({"seconds": 0.1, "bytes": 2**20}, None, 3),
        ({"seconds": 0.1, "bytes": 2**30}, None, 1),
        ({"seconds": 0.1}, 24, 8),
        ({"seconds": 0.1}, 21, 7),
        ({"seconds": 0.1}, 9, 3),
        ({"seconds": 0.1}, 10, 5),
        ({"seconds": 0.1}, 22, 8),  # 2 would be too few
        ({"seconds": 0.1}, 26, 7),  # four times, two too many
        ({"seconds": 0.1}, 3, 3),
        ({"seconds": 0.1}, 0, 8),
    ],
)
def test_as_many_batches_are_computed_together_as_are_worth_it(monkeypatch, known, epoch, count):
    monkeypatch.setattr(_compute_ahead, "AHEAD", 8)
    monkeypatch.setattr(_compute_ahead, "AHEAD_COMPILE", 2)
    monkeypatch.setattr(_compute_ahead, "AHEAD_BYTES", 3 * 2**20)
    program = Program(lambda values: values)
    for name, value in known.items():
        setattr(program, name, value)
    assert _compute_ahead.at_once(program, 1, epoch) == count


@pytest.mark.internal
@pytest.mark.parametrize("seconds, count", [(0.1, 8), (0.7, 4), (2, 2), (9, 1)])
def test_of_several_programs_side_by_side_one_is_compiled(monkeypatch, seconds, count):
    monkeypatch.setattr(_compute_ahead, "AHEAD", 8)
    monkeypatch.setattr(_compute_ahead, "AHEAD_COMPILE", 2)
    program = Program(lambda values: values)
    program.seconds = seconds
    assert _compute_ahead.at_once(program, 2, 16) == count
