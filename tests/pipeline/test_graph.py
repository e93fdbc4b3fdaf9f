"""Nodes and edges: a plan that runs, or the error that says why not."""

import itertools

import jax
import numpy as np
import pytest
from datarax_conformance import model
from helpers import (
    MODES,
    Affine,
    Count,
    Traces,
    add,
    assert_same,
    batch_words,
    by_step,
    columns,
    double,
    graph,
    increment,
    record_words,
    stage_of,
    sub,
)
from hypothesis import example, given, settings, strategies as st

from datarax import Pipeline, errors
from datarax.pipeline._graph import Graph
from datarax.sources import MemorySource, MemorySourceConfig

# What a node gets.


@pytest.mark.spec("DAG-001", "DAG-002", "DAG-003")
def test_a_node_reads_the_source_in_two_ways():
    nodes = {"a": double, "b": increment, "c": sub}
    for edges in ({"a": [], "b": [], "c": ["a", "b"]}, {"a": ["source"], "b": [], "c": ["a", "b"]}):
        assert graph(nodes, edges, "c").step()["x"].tolist() == [0, 1, 2, 3]
    direct = graph({"c": sub}, {"c": ["source", "source"]}, "c")
    assert direct.step()["x"].tolist() == [0, 0, 0, 0]


@pytest.mark.spec("DAG-004")
def test_predecessors_come_in_declared_order_and_as_often_as_declared():
    def fields(*batches):
        return {f"x{i}": batch["x"] for i, batch in enumerate(batches)}

    nodes = {"b": increment, "a": double, "z": fields}
    batch = graph(nodes, {"a": [], "b": [], "z": ["b", "a", "source", "b"]}, "z").step()
    assert [batch[f"x{i}"][0] for i in range(4)] == [2, 2, 1, 2]
    assert [batch[f"x{i}"][1] for i in range(4)] == [3, 4, 2, 3]
    assert set(batch) == {"x0", "x1", "x2", "x3"}


@pytest.mark.spec("DAG-001")
def test_the_sink_alone_makes_the_batch():
    nodes = {"a": lambda batch: {"other": batch["id"]}}
    assert set(graph(nodes, {"a": []}, "a").step()) == {"other"}


@pytest.mark.spec("DAG-008")
@pytest.mark.parametrize("nested", [False, True])
def test_readers_do_not_see_what_others_write(nested):
    def write(batch):
        inner = batch["deep"] if nested else batch
        inner["x"] = inner["x"] * 0
        inner.pop("id", None)
        return batch

    def read(batch):
        return batch["deep"] if nested else batch

    def stage(*batches):
        return {f"x{i}": read(batch)["x"] for i, batch in enumerate(batches)}

    def start(batch):
        return {"deep": dict(batch)} if nested else batch

    nodes = {"start": start, "write": write, "same": lambda b: b, "read": stage}
    edges = {"start": [], "write": ["start"], "same": ["start"], "read": ["write", "same", "start"]}
    stream = graph(nodes, edges, "read")
    for mode in MODES.values():
        [batch] = mode(stream, 1)
        assert [batch[f"x{i}"].tolist() for i in range(3)] == [[0] * 4, [1, 2, 3, 4], [1, 2, 3, 4]]


@pytest.mark.spec("DAG-006", "DAG-007", "DAG-008")
@pytest.mark.parametrize("mode", MODES)
def test_a_node_runs_once_however_many_read_it(mode):
    traces = Traces()

    def shared(batch):
        return batch

    nodes = {"count": Count(), "shared": traces(shared), "a": double, "b": double, "c": add}
    edges = {"count": [], "shared": ["count"], "a": ["shared"], "b": ["shared"]}
    stream = graph(nodes, {**edges, "c": ["a", "b", "shared", "count"]}, "c")
    assert traces["shared"] == 1
    batches = MODES[mode](stream, 3)
    assert traces["shared"] == 2
    assert [b["count"].tolist() for b in batches] == [[1] * 4, [2] * 4, [3] * 4]
    assert batches[0]["x"].tolist() == [6, 12, 18, 24]


@pytest.mark.spec("DAG-005", "DAG-012", "KEYS-009")
def test_the_order_of_declaration_does_not_count():
    nodes = {
        "a": Affine(2, 0), "noise": record_words, "b": Affine(1, 3), "c": sub, "n": Count(),
    }  # fmt: skip
    edges = {"a": [], "noise": ["a"], "b": [], "c": ["noise", "b"], "n": ["c"]}
    one = graph(nodes, edges, "n", seed=0, length=8)
    expected = by_step(one, 3)
    for order in (reversed, sorted):
        other = graph(
            {k: stage_of("count") if k == "n" else nodes[k] for k in order(list(nodes))},
            {k: edges[k] for k in order(list(edges))},
            "n",
            seed=0,
            length=8,
        )
        assert_same(by_step(other, 3), expected)


@pytest.mark.spec("DAG-012")
@pytest.mark.parametrize(
    "edges, order",
    [
        ({"a": [], "b": [], "c": ["a", "b"]}, "abc"),
        ({"b": [], "a": [], "c": ["a", "b"]}, "bac"),
        ({"c": ["a", "b"], "b": [], "a": []}, "bac"),
        ({"c": ["b"], "d": ["c", "a"], "a": [], "b": []}, "abcd"),
        ({"d": ["c"], "a": ["e"], "c": ["a"], "e": ["source"]}, "eacd"),
        ({"a": [], "b": ["a"], "c": [], "d": ["b", "c"]}, "abcd"),
    ],
)
def test_stages_run_in_topological_order_ties_as_declared(edges, order):
    nodes = {name: (lambda *b, name=name: {**b[0], name: b[0]["x"]}) for name in edges}
    sink = order[-1]
    stream = graph(nodes, edges, sink)
    assert "".join(stream.nodes) == order
    assert stream.stages == tuple(nodes[name] for name in order)
    assert list(stream.node_specs) == ["source", *order]
    assert order == "".join(model.execution_order({k: v or ["source"] for k, v in edges.items()}))


# Names.


@pytest.mark.spec("ERR-001", "KEYS-004", "DAG-012")
@settings(max_examples=10)
@given(st.text(min_size=1).filter(lambda name: name != "source" and name[0] != "_"))
@example("names")
@example("mask")
@example("größe")
@example("a.b/c:d [e]")
@example("train")
@example("pytree__state")
def test_any_name_is_a_name(name):
    stream = graph({name: batch_words}, {name: []}, name, seed=1)
    assert list(stream.nodes) == [name]
    assert stream.nodes[name] is batch_words
    assert name in str(stream) and stream.to_mermaid()
    stream.nodes[name] = double
    assert stream.nodes[name] is double


# Faults.


@st.composite
def any_graph(draw):
    names = ["a", "b", "c", "d", "e"][: draw(st.integers(0, 5))]
    anything = st.sampled_from([*names, *names, *names, "source", "nowhere"])
    lists = st.lists(anything, max_size=3)
    keys = draw(st.lists(st.sampled_from([*names, "nowhere"]), max_size=1))
    kept = draw(st.lists(st.sampled_from(names), unique=True, max_size=1)) if names else []
    edges = {name: draw(lists) for name in [*names, *keys] if name not in kept}
    return names, edges, draw(anything)


@st.composite
def a_wide_graph(draw):
    """Mostly sound: every node reads earlier ones, then a few edges are added anywhere."""
    names = [f"n{i}" for i in range(draw(st.integers(1, 40)))]
    edges = {
        name: draw(st.lists(st.sampled_from(["source", *names[:i]]), max_size=3))
        for i, name in enumerate(names)
    }
    for _ in range(draw(st.integers(0, 2))):
        edges[draw(st.sampled_from(names))].append(draw(st.sampled_from(names)))
    return draw(st.permutations(names)), edges, names[-1]


def fault_of(names, edges, sink):
    """The code of the error that the model gives, or None."""
    try:
        model.check_graph(dict.fromkeys(names, "add"), edges, sink)
    except model.Refused as refused:
        return refused.code
    return None


def assert_cycle(nodes, edges):
    """Each a predecessor of the next, the first repeated at the end, no others."""
    assert len(nodes) > 2 and nodes[0] == nodes[-1]
    assert len(set(nodes)) == len(nodes) - 1
    assert all(before in edges[after] for before, after in itertools.pairwise(nodes))


@pytest.mark.spec("ERR-031", "ERR-001", "ERR-003", "ERR-004")
@settings(max_examples=500)
@given(st.one_of(any_graph(), a_wide_graph()))
@example(([], {}, "source"))
@example((["a", "b", "c"], {"a": ["b"], "b": ["a"], "c": ["a", "b"]}, "c"))
def test_any_graph_is_sound_or_refused_with_its_code(drawn):
    names, edges, sink = drawn
    expected = fault_of(names, edges, sink)
    try:
        made = Graph.from_edges(names, edges, sink)
    except errors.GraphError as error:
        faults = {"cycle", "self-loop", "unknown-predecessor", "unknown-sink", "missing-edges",
                  "edges-without-node", "unused-node", "no-nodes"}  # fmt: skip
        assert error.code in faults and expected is not None
        if expected == "cycle" or error.code == "cycle":
            assert error.code == expected
            assert_cycle(error.nodes, edges)
    else:
        assert expected is None
        reads = {name: tuple(edges[name]) or ("source",) for name in names}
        assert dict(made.predecessors) == reads
        assert made.names == model.execution_order({k: list(reads[k]) for k in names})


@pytest.mark.spec("ERR-031", "ERR-002", "DAG-001")
@settings(max_examples=40)
@given(any_graph())
def test_any_graph_makes_a_pipeline_or_an_error_of_ours(drawn):
    names, edges, sink = drawn
    program = model.Program(columns(4), 2, "keep", None, dict.fromkeys(names, "add"), edges, sink)
    source = MemorySource(MemorySourceConfig(), columns(4))
    common = {"source": source, "edges": edges, "sink": sink, "batch_size": 2}
    try:
        stream = Pipeline.from_dag(**common, nodes=dict.fromkeys(names, add))
    except errors.GraphError:
        with pytest.raises(model.Refused):
            model.Stream(program)
    else:
        with jax.disable_jit():
            assert_same(jax.tree.map(np.asarray, stream.step()), model.Stream(program).step())


@pytest.mark.spec("ERR-031")
def test_a_long_chain_and_a_long_cycle_are_told_apart_at_once():
    names = [f"n{i}" for i in range(3000)]
    edges = {name: [before] for before, name in zip(["source", *names], names, strict=False)}
    assert Graph.from_edges(names, edges, names[-1]).names == tuple(names)
    edges["n0"] = [names[-1]]
    with pytest.raises(errors.CycleError) as error:
        Graph.from_edges(names, edges, names[-1])
    assert_cycle(error.value.nodes, edges)
    assert len(error.value.nodes) == 3001


@pytest.mark.spec("DAG-001")
def test_nodes_have_names(unchecked):
    with pytest.raises(TypeError, match=r"^`nodes` is a dict of stages by name, got list\.$"):
        graph([double], {"double": []}, "double")
