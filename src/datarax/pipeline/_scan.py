"""`scan`: many batches in one compiled loop."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._rows import span
from .._types import is_traced
from ..errors import LastBatchError
from ..sources._base import length_of
from ._core import scan_program

if TYPE_CHECKING:
    from ._pipeline import Pipeline


def scan(
    pipeline: "Pipeline",
    step_fn: Callable[..., Any],
    length: int | None,
    modules: Sequence[Any],
    init_carry: Any,
) -> Any:
    """See `Pipeline.scan`."""
    runtime = pipeline.runtime
    with runtime.lock:
        if length is None:
            length = _rest_of_epoch(pipeline)
        position = pipeline.position
        position.set_raw_value(position.get_raw_value())  # fails early, as in `Runtime.take`
        binding = runtime.bind(pipeline, tuple(modules))
        values = binding.read()
        size, policy = pipeline.batch_size, pipeline.last_batch
        epochs = span(size, length_of(pipeline.source), policy)
        carried = init_carry is not None
        program = scan_program(binding.structure, step_fn, length, size, epochs, carried)
        after, carry, outs = program(values, init_carry)
        program.wait((after, outs))
        binding.write(after)
    return (carry, outs) if carried else outs


def _rest_of_epoch(pipeline: "Pipeline") -> int:
    """How many batches are left in the cursor's epoch."""
    records = length_of(pipeline.source)
    if records is None:
        raise LastBatchError("A source without end needs `length` in scan(step_fn, length).")
    cursor = pipeline.runtime.settled(pipeline)
    if is_traced(cursor.offset):
        raise TypeError("Inside a traced function scan() needs `length`, a number.")
    rest = records - cursor.offset
    whole, over = divmod(rest, pipeline.batch_size)
    if over and pipeline.last_batch == "keep":
        raise LastBatchError(
            f'Under last_batch="keep" the {rest} records left in the epoch are no whole number of '
            f"batches of {pipeline.batch_size}, and all batches of a scan have one size. Give "
            f"`length` (the scan then runs on into the next epoch), or build the pipeline with "
            f'last_batch="drop" or "pad".'
        )
    return whole + (over > 0 and pipeline.last_batch == "pad")
