"""The table of workloads, each as a pipeline and as an expert writes it by hand.

Both sides of a workload share the data, the functions that work on it, and the consumer of a batch.
Only the pipeline differs. `check` fails unless both give the same batches.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.harness import Side
from flax import nnx

from datarax import Pipeline
from datarax.operators import Element, ElementOperator, ElementOperatorConfig
from datarax.sources import MemorySource, MemorySourceConfig

SEED = 0
Mode = Literal["for", "step", "scan"]
MODES: tuple[Mode, ...] = ("for", "step", "scan")
Batch = Mapping[str, Any]
Keys = Callable[[str], jax.Array]
Take = Callable[[], Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """`stages(parameters)` are those of a pipeline; `by_hand(parameters, batch, keys)` does their
    work, where `keys(name)` are the keys of the batch's records for the stage of that name.

    `scan` reduces a batch to a number, and the other modes leave it as it is. With `learns`, a
    batch trains a small network in all modes. At most `timed` batches of an epoch are timed.
    """

    name: str
    data: Callable[[], dict[str, np.ndarray]]
    batch_size: int
    parameters: Callable[[], Any] = tuple
    stages: Callable[[Any], dict[str, Any]] = lambda parameters: {"stages": []}
    by_hand: Callable[[Any, Batch, Keys], Batch] = lambda parameters, batch, keys: batch
    learns: bool = False
    timed: int = 100

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    @functools.cached_property
    def length(self) -> int:
        return len(next(iter(self.data().values())))

    @property
    def batches(self) -> int:
        """How many batches are timed: whole ones of one epoch, the same number in every mode."""
        return min(self.timed, self.length // self.batch_size)


# The two sides, each as a compiled loop and as a function that gives the next batch.


def pipeline(work: Workload, shuffle: bool) -> Pipeline:
    return Pipeline(
        source=MemorySource(MemorySourceConfig(shuffle=shuffle), work.data()),
        batch_size=work.batch_size,
        rngs=nnx.Rngs(SEED),
        **work.stages(work.parameters()),
    )


def ours(work: Workload, shuffle: bool, mode: Mode) -> Side:
    """The pipeline, as a user drives it."""
    made = pipeline(work, shuffle)
    if mode != "scan":
        return looped(work, made.reset, lambda: iter(made).__next__ if mode == "for" else made.step)
    use, modules = (train, network()) if work.learns else (reduce, ())
    return Side(made.reset, lambda: made.scan(use, work.batches, modules=modules))


def floor(work: Workload, shuffle: bool, mode: Mode) -> Side:
    """The same by hand: one compiled loop for `scan`, else a loop over one compiled function."""
    hand = ByHand(work, shuffle)
    if mode != "scan":
        return looped(work, lambda: None, hand.taker)
    return Side(lambda: None, hand.scanner())


def looped(work: Workload, reset: Callable[[], Any], taker: Callable[[], Take]) -> Side:
    """A loop over batches that waits for each one."""
    learn = learner() if work.learns else lambda batch: batch

    def drive() -> None:
        take = taker()
        for _ in range(work.batches):
            jax.block_until_ready(learn(take()))

    return Side(reset, drive, taker)


class ByHand:
    """A workload without a pipeline. To shuffle, it gathers by an order given as an array."""

    def __init__(self, work: Workload, shuffle: bool):
        self.work = work
        self.order = jnp.asarray(order_of(work.length)) if shuffle else None
        self.given = jax.device_put((work.data(), work.parameters()))

    def fetch(self, position: jax.Array, order: Any, given: Any) -> Batch:
        (data, parameters), length = given, self.work.length
        place = position + jnp.arange(self.work.batch_size)
        record = place % length if order is None else order[place % length]

        def keys(name: str) -> jax.Array:
            node = jax.random.fold_in(jax.random.key(SEED), zlib.crc32(name.encode()))
            epochs = jax.vmap(jax.random.fold_in, (None, 0))(node, place // length)
            return jax.vmap(jax.random.fold_in)(epochs, record)

        batch = {name: column[record] for name, column in data.items()}
        return self.work.by_hand(parameters, batch, keys)

    def after(self, position: jax.Array) -> jax.Array:
        return (position + self.work.batch_size) % self.work.length

    def taker(self) -> Take:
        position = jnp.int32(0)

        def take() -> Batch:
            nonlocal position
            batch, position = self.step(position, self.order, self.given)
            return batch

        return take

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        return jax.jit(
            lambda position, *given: (self.fetch(position, *given), self.after(position))
        )

    def scanner(self) -> Callable[[], Any]:
        graph, state = nnx.split(network() if self.work.learns else ())

        @jax.jit
        def epoch(state, *given):
            def body(carry, _):
                position, state = carry
                batch = self.fetch(position, *given)
                modules = nnx.merge(graph, state)
                out = train(*modules, batch) if self.work.learns else reduce(batch)
                return (self.after(position), nnx.state(modules)), out

            (_, state), outs = jax.lax.scan(body, (jnp.int32(0), state), length=self.work.batches)
            return state, outs

        def call() -> Any:
            nonlocal state
            state, outs = epoch(state, self.order, self.given)
            return outs

        return call


@functools.cache
def order_of(length: int) -> np.ndarray:
    """The records of the first epoch in their shuffled order, for the side by hand."""
    records = {"record": np.arange(length, dtype=np.int32)}
    source = MemorySource(MemorySourceConfig(shuffle=True), records, rngs=nnx.Rngs(SEED))
    return np.asarray(source.get_batch_at(0, length)["record"])


def check(ours: Side, floor: Side, first: tuple[Any, Any]) -> None:
    """Fails unless both sides do the same work: by their first results, or by three batches."""
    pairs = [first]
    if ours.taker and floor.taker:
        ours.prepare()
        takes = ours.taker(), floor.taker()
        pairs = [tuple(take() for take in takes) for _ in range(3)]
    for found, expected in pairs:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)


# The consumers of a batch.


def reduce(batch: Batch) -> jax.Array:
    """A number that needs every value of the batch, so that no gather can be left out."""
    return sum(x.astype(jnp.float32).sum() for x in batch.values())  # pyright: ignore


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(100, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


def network() -> tuple[Network, nnx.Optimizer]:
    model = Network(nnx.Rngs(SEED))
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def train(model: Network, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    """Takes one step of the optimizer and returns the loss."""

    def loss(model: Network) -> jax.Array:
        logits = model(batch["features"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def learner() -> Callable[[Batch], jax.Array]:
    """`train` as an expert calls it in a loop: compiled, on the bare state."""
    graph, state = nnx.split(network())

    @jax.jit
    def step(state, batch):
        modules = nnx.merge(graph, state)
        loss = train(*modules, batch)
        return nnx.state(modules), loss

    def learn(batch: Batch) -> jax.Array:
        nonlocal state
        state, loss = step(state, batch)
        return loss

    return learn


# The table.


@functools.cache
def table(length: int, width: int, fields: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(42)
    names = ["features", *(f"features_{i}" for i in range(1, fields))]
    return {name: rng.standard_normal((length, width), np.float32) for name in names}


@functools.cache
def tokens() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(42)
    return {"tokens": rng.integers(0, 32_000, (10_000, 128), np.int32)}


@functools.cache
def images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(42)
    return {"image": rng.integers(0, 256, (10_000, 32, 32, 3), np.uint8)}


@functools.cache
def labelled() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(42)
    return table(10_000, 100) | {"label": rng.integers(0, 10, 10_000, np.int32)}


def normalise(batch: Batch) -> Batch:
    return {**batch, "features": (batch["features"] - 0.5) / 0.5}


def crop_image(image: jax.Array, key: jax.Array) -> jax.Array:
    """32 x 32 out of the image with 4 zero pixels around it."""
    padded = jnp.pad(image, ((4, 4), (4, 4), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 9)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def flip_image(image: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def scale_image(image: jax.Array) -> jax.Array:
    return (image.astype(jnp.float32) - 127.5) / 63.75


def crop(element: Element, key: jax.Array) -> Element:
    return element.update_data({"image": crop_image(element.data["image"], key)})


def flip(element: Element, key: jax.Array) -> Element:
    return element.update_data({"image": flip_image(element.data["image"], key)})


def scale(batch: Batch) -> Batch:
    return {**batch, "image": scale_image(batch["image"])}


def augmented(_: Any) -> dict[str, Any]:
    config = ElementOperatorConfig(stochastic=True)
    return {"stages": [ElementOperator(config, fn=crop), ElementOperator(config, fn=flip), scale]}


def augmented_by_hand(_: Any, batch: Batch, keys: Keys) -> Batch:
    image = jax.vmap(crop_image)(batch["image"], keys("crop"))
    image = jax.vmap(flip_image)(image, keys("flip"))
    return {"image": scale_image(image)}


def brighten(batch: Batch) -> Batch:
    return {**batch, "features": batch["features"] * 1.2}


def stack(left: Batch, right: Batch) -> Batch:
    return {"features": jnp.stack([left["features"], right["features"]], axis=1)}


def branching(_: Any) -> dict[str, Any]:
    return {
        "nodes": {"brighten": brighten, "normalise": normalise, "stack": stack},
        "edges": {"brighten": [], "normalise": [], "stack": ["brighten", "normalise"]},
        "sink": "stack",
    }


class Affine(nnx.Module):
    def __init__(self, factor: float, shift: float):
        self.factor = nnx.Param(jnp.float32(factor))
        self.shift = nnx.Param(jnp.float32(shift))

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "features": batch["features"] * self.factor[...] + self.shift[...]}


def affine_by_hand(parameters: Any, batch: Batch, keys: Keys) -> Batch:
    del keys
    features = batch["features"]
    for factor, shift in parameters:
        features = features * factor + shift
    return {**batch, "features": features}


def tabular(
    name: str, *, length: int = 10_000, batch_size: int = 64, depth: int = 0, fields: int = 1
) -> Workload:
    """A table of 16 numbers per field, through `depth` stages, each with its own parameters."""
    return Workload(
        name=name,
        data=functools.partial(table, length, 16, fields),
        batch_size=batch_size,
        parameters=lambda: [(np.float32(0.99), np.float32(0.01))] * depth,
        stages=lambda parameters: {"stages": [Affine(*pair) for pair in parameters]},
        by_hand=affine_by_hand,
    )


WORKLOADS = (
    Workload(name="NLP-1 small", data=tokens, batch_size=32),
    Workload(
        name="TAB-1 small",
        data=functools.partial(table, 10_000, 100),
        batch_size=256,
        stages=lambda _: {"stages": [normalise]},
        by_hand=lambda _, batch, keys: normalise(batch),
    ),
    Workload(
        name="CV-1 small",
        data=images,
        batch_size=64,
        stages=augmented,
        by_hand=augmented_by_hand,
    ),
    Workload(
        name="branching DAG",
        data=functools.partial(table, 10_000, 100),
        batch_size=64,
        stages=branching,
        by_hand=lambda _, batch, keys: stack(brighten(batch), normalise(batch)),
    ),
    *(tabular(f"depth {depth}", depth=depth) for depth in (1, 10, 100)),
    Workload(name="train step", data=labelled, batch_size=64, learns=True),
)
