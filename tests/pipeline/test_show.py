"""A pipeline shows its nodes, what they read and what they give."""

import inspect
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Affine, Count, Endless, EqxScale, double, pipeline, sub

from datarax import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig


@pytest.fixture(scope="module")
def stream():
    data = {"id": np.arange(6), "x": np.zeros((6, 2), np.float32)}
    made = Pipeline.from_dag(
        source=MemorySource(MemorySourceConfig(), data),
        nodes={"scale": Affine(2, 1), "less": sub, "n": Count()},
        edges={"scale": [], "less": ["scale", "source"], "n": ["less"]},
        sink="n",
        batch_size=4,
        last_batch="drop",
    )
    made.seek(epoch=3)
    return made


@pytest.mark.spec("DAG-023")
def test_it_prints_a_table_of_its_nodes(stream):
    assert str(stream) == (
        "Pipeline: 6 records, batch_size=4, last_batch='drop', cursor=(3, 0)\n"
        "node    stage         reads          gives\n"
        "------  ------------  -------------  -------------------------------------\n"
        "source  MemorySource                 id int32[4], x float32[4,2]\n"
        "scale   Affine        source         id int32[4], x float32[4,2]\n"
        "less    sub           scale, source  id int32[4], x float32[4,2]\n"
        "n       Count         less           count int32[4], id int32[4], x float32[4,2]"
    ).replace("-" * 37, "-" * 43)


@pytest.mark.spec("DAG-023")
def test_an_abstract_one_shows_no_cursor():
    abstract = nnx.eval_shape(lambda: pipeline(length=8, batch_size=4))
    assert str(abstract).startswith(
        "Pipeline: 8 records, batch_size=4, last_batch='keep', abstract\nnode "
    )
    for use in (abstract.step, abstract.get_state, lambda: abstract.cursor):
        with pytest.raises(TypeError, match=r"as `nnx\.eval_shape` makes it, and has no cursor"):
            use()


@pytest.mark.spec("DAG-023")
def test_it_draws_its_graph_with_shapes_on_the_edges(stream):
    assert stream.to_mermaid() == "\n".join(
        [
            "graph TB",
            '    n0["source: MemorySource"]',
            '    n1["scale: Affine"]',
            '    n2["less: sub"]',
            '    n3["n: Count"]',
            '    n0 -->|"id int32[4]<br/>x float32[4,2]"| n1',
            '    n1 -->|"id int32[4]<br/>x float32[4,2]"| n2',
            '    n0 -->|"id int32[4]<br/>x float32[4,2]"| n2',
            '    n2 -->|"id int32[4]<br/>x float32[4,2]"| n3',
            '    n3 -->|"count int32[4]<br/>id int32[4]<br/>x float32[4,2]"| out([batch])',
        ]
    )


@pytest.mark.spec("DAG-023")
def test_a_notebook_shows_the_same_table(stream):
    page = ElementTree.fromstring(stream._repr_html_())
    assert page.find("strong").text == str(stream).splitlines()[0]
    table = [[cell.text or "" for cell in row] for row in page.iter("tr")]
    assert table[0] == ["node", "stage", "reads", "gives"]
    assert [row[0] for row in table[1:]] == ["source", "scale", "less", "n"]
    assert table[3] == ["less", "sub", "scale, source", "id int32[4], x float32[4,2]"]


@pytest.mark.spec("DAG-023")
def test_names_cannot_break_the_pictures():
    name = 'a "b" <i>&, c -->'
    made = Pipeline.from_dag(
        source=MemorySource(MemorySourceConfig(), {"<x>, y": np.zeros(4)}),
        nodes={name: lambda b: b, "z": lambda b: b},
        edges={name: [], "z": [name]},
        sink="z",
        batch_size=2,
    )
    rows = [[cell.text for cell in row] for row in ElementTree.fromstring(
        made._repr_html_()
    ).iter("tr")]  # fmt: skip
    assert rows[2][0] == name and rows[2][3] == "<x>, y float32[2]"
    assert rows[3][2] == name
    edges = [line for line in made.to_mermaid().splitlines() if "-->|" in line]
    assert len(edges) == 3
    assert all(line.count('"') == 2 for line in edges)


@pytest.mark.spec("DAG-023", "DAG-017")
def test_other_pipelines_show_themselves_too():
    class Own(Pipeline):
        def __call__(self, batch):
            return {"y": batch["x"]}

    assert str(pipeline(cls=Own)).splitlines()[0].startswith("Own: 10 records")
    assert str(pipeline(cls=Own)).splitlines()[-1].split() == [
        "__call__", "Own", "source", "y", "float32[4]",
    ]  # fmt: skip
    assert str(pipeline(source=Endless())).startswith("Pipeline: endless, batch_size=4")
    chain = str(pipeline([EqxScale(jnp.float32(1)), double, lambda b: b])).splitlines()
    assert [line.split()[:3] for line in chain[4:]] == [
        ["EqxScale", "EqxScale", "source"],
        ["double", "double", "EqxScale"],
        ["lambda", "<lambda>", "double"],
    ]


@pytest.mark.spec("DAG-019", "DAG-023")
def test_to_look_at_it_moves_nothing(stream):
    for _ in range(2):
        str(stream), repr(stream), stream.to_mermaid(), stream._repr_html_()
    assert stream.cursor == (3, 0)
    assert stream.nodes["n"].seen[...] == 0


@pytest.mark.internal
def test_help_shows_the_parameters_of_the_constructor():
    class Own(Pipeline):
        def __init__(self, size):
            super().__init__(source=Endless(), batch_size=size)

    assert "batch_size" in inspect.signature(Pipeline).parameters
    assert list(inspect.signature(Own).parameters) == ["size"]
