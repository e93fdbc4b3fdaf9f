"""Which stage an error at run time belongs to."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from .._keys import SOURCE
from .._rows import Cut
from .._types import spec_text
from ..errors import DataraxError, StageError
from ..sources._callback import raised_in
from ._binding import Binding, Values, merge
from ._core import fetched_from, order_at, run_stages, start_of
from ._program import Program

if TYPE_CHECKING:
    from ._pipeline import Pipeline


def by_hand(binding: Binding, cut: Cut, values: Values, order: Any, read: Any = None) -> None:
    """Runs batches op by op, outside of a program, so that a failing stage is named."""
    copy, *_ = merge(binding.structure, values)
    start = start_of(copy, cut)
    if order is None and not read:
        order = order_at(copy, start.epoch, cut.epochs)
    for fetched, at in read or [(fetched_from(copy, order, start, cut), start)]:
        run_stages(copy, jax.device_put(fetched), at, cut)  # stages get JAX arrays, as in a program


def blame(
    pipeline: "Pipeline", program: Program, error: Exception, again: Callable[[], None] | None
) -> None:
    """Raises a `StageError` for an error at run time if its stage can be found, or the error of a
    source that is read by a callback. Returns if neither is known.

    At run time only nodes with callbacks fail. If several have some, `again` computes the batch op
    by op; if that succeeds, the error names all of them. `again` also finds the stage of a program
    that does not compile, because the device lacks an operation.
    """
    if SOURCE in program.host_nodes and (read := raised_in(error)) is not None:
        raise read
    stages = sorted(x for x in program.host_nodes if x is not None and x != SOURCE)
    uncompiled = program.traced and not program.called
    if isinstance(error, DataraxError) or not (stages or uncompiled):
        return
    if not stages or len(program.host_nodes) > 1:
        try:
            if again is not None:
                again()
        except StageError as named:
            raise named from error
        except Exception:
            return
        if not stages or len(stages) < len(program.host_nodes):
            return  # it may have been the source, or the function of a scan
    specs, graph = pipeline.node_specs, pipeline._graph
    came = {p: spec_text(specs[p]) for stage in stages for p in graph.reads(stage)}
    raise StageError(" or ".join(stages), came, f"{type(error).__name__}: {error}") from error
