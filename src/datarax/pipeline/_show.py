"""A pipeline for people: as text, as a Mermaid flowchart, as HTML."""

from html import escape
from typing import TYPE_CHECKING

import jax

from .._keys import SOURCE
from .._types import Spec, field_texts, spec_text
from ..sources._base import length_of

if TYPE_CHECKING:
    from ._pipeline import Pipeline

HEADER = ("node", "stage", "reads", "gives")


def rows(pipeline: "Pipeline") -> list[tuple[str, str, str, str]]:
    """One row a node, in execution order: name, type, predecessors, output."""
    specs, graph = pipeline.node_specs, pipeline._graph
    table = [(SOURCE, type(pipeline.source).__name__, "", spec_text(specs[SOURCE]))]
    for name in list(specs)[1:]:
        stage = pipeline.nodes[name] if name in graph.names else pipeline
        kind = getattr(stage, "__name__", type(stage).__name__)
        table.append((name, kind, ", ".join(graph.reads(name)), spec_text(specs[name])))
    return table


def title(pipeline: "Pipeline") -> str:
    length = length_of(pipeline.source)
    records = "endless" if length is None else f"{length} records"
    sharding = pipeline.sharding
    devices = "" if sharding is None else f", {sharding.spec} over {sharding.num_devices} devices"
    abstract = isinstance(pipeline._cursor_state.get_raw_value(), jax.ShapeDtypeStruct)
    where = "abstract" if abstract else f"cursor={tuple(pipeline.cursor)}"
    return (
        f"{type(pipeline).__name__}: {records}, batch_size={pipeline.batch_size}, "
        f"last_batch={pipeline.last_batch!r}, {where}{devices}"
    )


def table(pipeline: "Pipeline") -> str:
    """A title line and a table, columns padded to their widest cell."""
    cells = [HEADER, *rows(pipeline)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title(pipeline), lines[0], rule, *lines[1:]])


def html(pipeline: "Pipeline") -> str:
    """The same table for a notebook."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows(pipeline))
    return (
        f"<div><strong>{escape(title(pipeline))}</strong>"
        f"<table><thead>{row(HEADER, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def mermaid(pipeline: "Pipeline") -> str:
    """The graph as a Mermaid flowchart, shapes on its edges."""
    specs, table = pipeline.node_specs, rows(pipeline)
    ids = {name: f"n{i}" for i, name in enumerate(specs)}
    lines = ["graph TB"]
    lines += [f"    {ids[name]}[{_quoted(f'{name}: {kind}')}]" for name, kind, _, _ in table]
    for name in list(specs)[1:]:
        for predecessor in pipeline._graph.reads(name):
            shapes = _shapes(specs[predecessor])
            lines.append(f"    {ids[predecessor]} -->|{shapes}| {ids[name]}")
    lines.append(f"    {ids[pipeline._sink]} -->|{_shapes(specs[pipeline._sink])}| out([batch])")
    return "\n".join(lines)


def _shapes(spec: Spec) -> str:
    return _quoted("<br/>".join(field_texts(spec)))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "#quot;") + '"'
