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
    """Makes batches stage by stage, so that the stage that fails is known."""
    copy, *_ = merge(binding.structure, values)
    start = start_of(copy, cut)
    if order is None and not read:
        order = order_at(copy, start.epoch, cut.epochs)
    for fetched, at in read or [(fetched_from(copy, order, start, cut), start)]:
        run_stages(copy, jax.device_put(fetched), at, cut)  # as a stage sees it in a program


def blame(
    pipeline: "Pipeline", program: Program, error: Exception, again: Callable[[], None] | None
) -> None:
    """Raises a `StageError` for an error at run time, where the stage can be known, or the error of
    the source that was read meanwhile.

    Only stages that call the host fail at run time. Where there are several, the batch is made
    `again`, by hand; if it then goes well, all of them are named. The same is done for a program
    that does not compile, as some operations do not on some device.
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
            return  # it may as well have been the source, or the function of a scan
    specs, graph = pipeline.node_specs, pipeline._graph
    came = {p: spec_text(specs[p]) for stage in stages for p in graph.reads(stage)}
    raise StageError(" or ".join(stages), came, f"{type(error).__name__}: {error}") from error
