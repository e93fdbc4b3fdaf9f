"""`scan`: many batches in one compiled loop."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .._rows import advance, host_where, pack, running_on
from .._types import integer, is_traced
from ..errors import LastBatchError, ScanLengthError
from ..sources._base import length_of
from ._core import scan_program
from ._iterator import blame, policy

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
    runtime, asked = pipeline._runtime, length
    with runtime.lock:
        length = _rest_of_epoch(pipeline) if length is None else integer(length, -1)
        if length < 0:
            raise ScanLengthError(asked)
        pipeline._cursor_state.claim()
        runtime.look(pipeline)
        if not isinstance(modules, Sequence):
            raise TypeError(f"`modules` must be a list or tuple of NNX objects, got {modules!r}.")
        binding = runtime.bind(pipeline, tuple(modules))
        values = binding.read()
        cut = running_on(*policy(pipeline))
        carried = init_carry is not None
        _check_end(pipeline, length)
        program = scan_program(binding.structure, _hashable(step_fn), length, cut, carried)
        try:
            after, carry, outs = program(values, init_carry)
        except Exception as error:
            blame(pipeline, program, error, None)
            raise
        binding.write(after, values)
    return (carry, outs) if carried else outs


def _rest_of_epoch(pipeline: "Pipeline") -> int:
    """How many batches are left in the cursor's epoch."""
    records = length_of(pipeline.source)
    if records is None:
        raise LastBatchError("A source without end needs `length` in scan(step_fn, length).")
    cursor = pipeline._runtime.start
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


class _ById:
    """A function that cannot be hashed, known by its identity, which lives as long as this."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __hash__(self) -> int:
        return id(self.function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.function is other.function


def _check_end(pipeline: "Pipeline", length: int) -> None:
    """Raises before a scan that would pass the last place that a cursor can count."""
    start = pipeline._runtime.start
    if not is_traced(start.epoch):
        size, records, _ = policy(pipeline)
        pack(advance(start, length * size, records, "keep", host_where), records)


def _hashable(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        hash(function)
    except TypeError:
        return _ById(function)
    return function
