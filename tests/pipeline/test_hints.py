"""jaxtyping annotations of stages are checked at construction, with one binding for the graph."""

import functools
from typing import Any, TypedDict

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import MODES, pipeline
from jaxtyping import Array, Float, Float32, Int, PyTree, UInt8

from datarax import Pipeline
from datarax.errors import StageError
from datarax.sources import MemorySource, MemorySourceConfig

IMAGES = {
    "image": np.zeros((10, 6, 5, 3), np.float32),
    "depth": np.zeros((10, 6, 5), np.float32),
    "label": np.arange(10, dtype=np.int32),
}


def over(data, *stages, **options):
    """A chain over some data."""
    return pipeline(stages, source=MemorySource(MemorySourceConfig(), data), **options)


def as_written(error):
    """The text, with annotations as in the program and not as this version of JAX has them."""
    return str(error.value).replace("jaxlib._jax.Array", "Array")


class Picture(TypedDict):
    image: Float[Array, "b h w c"]
    label: Int[Array, " b"]


class Depth(TypedDict):
    depth: Float[Array, "b h w"]


def picture(batch: Picture) -> Picture:
    return batch


def depth(batch: Depth) -> dict[str, Any]:
    return batch


@pytest.mark.spec("DAG-020", "ERR-001")
def test_annotations_that_hold_are_accepted():
    def each(batch: dict[str, Float[Array, "b ..."]]) -> Float[Array, "b ..."] | dict:
        return batch

    def tree(batch: PyTree[Float32[Array, "b ..."], "T"]) -> PyTree[Float32[Array, "b ..."], "T"]:
        return batch

    over(IMAGES, picture, depth)
    floats = {"image": IMAGES["image"], "depth": IMAGES["depth"]}
    over(floats, each, tree)


@pytest.mark.spec("DAG-020", "ERR-002", "ERR-025")
def test_an_annotation_that_does_not_hold_is_refused_with_its_stage():
    data = {**IMAGES, "label": np.zeros((10, 2), np.int32)}
    with pytest.raises(StageError) as error:
        over(data, lambda b: b, picture)
    assert error.value.node == "picture"
    assert as_written(error) == (
        "Stage 'picture' failed: argument `batch`, field 'label', is annotated "
        "Int[Array, 'b'], got int32[4,2]; an axis name means the same size in every stage of a "
        "graph.\nIt was called with\n  lambda: depth float32[4,6,5], image float32[4,6,5,3], "
        "label int32[4,2]"
    )


@pytest.mark.spec("DAG-020", "ERR-002")
def test_two_stages_that_disagree_on_an_axis_are_refused():
    data = {**IMAGES, "depth": np.zeros((10, 7, 5), np.float32)}
    with pytest.raises(StageError) as error:
        over(data, picture, depth)
    assert error.value.node == "depth"
    text = "field 'depth', is annotated Float[Array, 'b h w'], got float32[4,7,5]"
    assert text in as_written(error)
    over(data, picture)
    over(data, depth)


@pytest.mark.spec("DAG-020", "ERR-002")
@pytest.mark.parametrize(
    "build",
    [
        lambda stages: over(IMAGES, *stages.values()),
        lambda stages: Pipeline.from_dag(
            source=MemorySource(MemorySourceConfig(), IMAGES),
            nodes={**stages, "join": lambda a, b: {**a, **b}},
            edges={"a": [], "b": [], "join": ["a", "b"]},
            sink="join",
            batch_size=4,
        ),
    ],
    ids=["chain", "branches"],
)
def test_a_result_counts_as_well_as_an_argument(build):
    class Half(TypedDict):
        image: Float[Array, "b h2 w2 c"]

    class Square(TypedDict):
        image: Float[Array, "b h2 h2 c"]

    def halve(batch: Picture) -> Half:
        return {**batch, "image": batch["image"][:, ::2, ::2]}

    def crop(batch) -> Square:
        return {**batch, "image": batch["image"][:, :3, :3]}

    build({"a": halve, "b": crop})

    def wrong(batch) -> Square:
        return {**batch, "image": batch["image"][:, :2, :2]}

    with pytest.raises(StageError, match="the result, field 'image', is annotated"):
        build({"a": halve, "b": wrong})


class NnxStage(nnx.Module):
    def __call__(self, batch: dict[str, Float[Array, "b x"]]) -> dict[str, Any]:
        return batch


class EqxStage(eqx.Module):
    def __call__(self, batch: dict[str, Float[Array, "b x"]]) -> dict[str, Any]:
        return batch


def function(batch: dict[str, Float[Array, "b x"]]) -> dict[str, Any]:
    return batch


def variadic(*batches: dict[str, Float[Array, "b x"]]) -> dict[str, Any]:
    return batches[0]


def partial(n: int, batch: dict[str, Float[Array, "b x"]]) -> dict[str, Any]:
    return batch


STAGES = {
    "nnx": NnxStage(),
    "eqx": EqxStage(),
    "function": function,
    "variadic": variadic,
    "partial": functools.partial(partial, 3),
    "jit": jax.jit(function),
}


@pytest.mark.spec("DAG-020", "DAG-015")
@pytest.mark.parametrize("stage", STAGES)
def test_annotations_of_stages_of_every_kind_are_checked(stage):
    over({"x": np.zeros((10, 3))}, STAGES[stage])
    with pytest.raises(StageError) as error:
        over({"x": np.zeros(10)}, STAGES[stage])
    assert "field 'x', is annotated Float[Array, 'b x'], got float32[4]" in as_written(error)


@pytest.mark.spec("DAG-020")
def test_the_second_predecessor_is_checked_too():
    def join(first: dict[str, Float[Array, " b"]], second: dict[str, Float[Array, "b 2"]]) -> Any:
        return first

    def wide(width):
        def stage(batch):
            return {"x": jnp.zeros((len(batch["x"]), width))}

        return stage

    def build(width):
        return Pipeline.from_dag(
            source=MemorySource(MemorySourceConfig(), {"x": np.zeros(10)}),
            nodes={"wide": wide(width), "join": join},
            edges={"wide": [], "join": ["source", "wide"]},
            sink="join",
            batch_size=4,
        )

    build(2)
    with pytest.raises(StageError, match="argument `second`, field 'x', is annotated") as error:
        build(3)
    assert list(error.value.predecessors) == ["source", "wide"]


@pytest.mark.spec("DAG-020")
@pytest.mark.parametrize("wrong", range(1, 4))
def test_all_predecessors_that_one_parameter_takes_are_checked(wrong):
    def join(first: Any, *others: dict[str, Float[Array, "b 2"]]) -> Any:
        return first

    columns = {f"x{i}": np.zeros((10, 3 if i == wrong else 2)) for i in range(1, 4)}
    nodes = {x: lambda batch, x=x: {"x": batch[x]} for x in columns}
    with pytest.raises(StageError, match="argument `others`, field 'x', is annotated"):
        Pipeline.from_dag(
            source=MemorySource(MemorySourceConfig(), columns),
            nodes={**nodes, "join": join},
            edges={**{x: [] for x in nodes}, "join": ["source", *nodes]},
            sink="join",
            batch_size=4,
        )


@pytest.mark.spec("DAG-020", "ERR-001")
def test_annotations_that_say_nothing_of_arrays_are_left_alone():
    def odd(batch: "a name that only a type checker knows") -> "nonsense(":
        return batch

    def plain(batch: dict, other: int = 3) -> dict:
        return batch

    def numbers(batch: dict[str, UInt8[Array, "b"] | Int[Array, "b"]]) -> dict[str, Array]:
        return batch

    def unknown(batch: Unknown) -> dict[str, Array]:
        return batch

    def computed(batch: dict[str, Int[Array, "b-1"]]) -> dict[str, Int[Array, "{self.width}"]]:
        return batch

    for stage in (odd, plain, numbers, unknown, computed):
        over({"x": np.arange(10, dtype=np.int32)}, stage)


class Unknown(TypedDict):
    x: "OnlyForCheckers"  # pyright: ignore[reportUndefinedVariable]


@pytest.mark.spec("DAG-020", "ITER-002")
@pytest.mark.parametrize("mode", MODES)
def test_a_shorter_batch_is_a_new_size_of_its_axis(mode):
    stream = over(IMAGES, picture, depth)
    for _ in range(2):
        assert len(MODES[mode](stream, 3)) == 3
