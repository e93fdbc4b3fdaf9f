# %% [markdown]
# # Train on digits
#
# A digit classifier, trained from a pipeline in every way that a pipeline can be consumed.
#
# The data are the 1,797 handwritten digits that come with scikit-learn. Two pipelines feed the same
# model: a chain with a random augmentation, and a graph that shows each digit twice, clean and
# augmented. Each is trained once in a `for` loop and once with `scan`, which compiles a whole epoch
# into one program. The script fails unless
#
# - both ways of consuming a pipeline give the same batches, bit for bit and in the same order,
# - every model reaches a test accuracy of 0.95,
# - a fresh process that resumes in the middle of an epoch sees the rest of the batches and ends
#   with the parameters of the run that was never interrupted.
#
# `make demo` runs it; what it printed for this page is at the end.

# %%
import argparse
import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from datarax import Pipeline
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.sources import MemorySource, MemorySourceConfig

SEED = 0
EPOCHS = 50
BATCH_SIZE = 64
EPOCH_BATCHES = 1437 // BATCH_SIZE
CUT = 30 * EPOCH_BATCHES + 9  # batches until the run is interrupted: in the middle of epoch 30
ACCURACY = 0.95
GUIDE = Path(__file__).parent / "advanced/dag/01_dag_fundamentals_guide.py"


# %% [markdown]
# ## Data
#
# Every image carries its `number`, so that a batch says which records it holds.


# %%
def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The training and the test set: images with pixels in [0, 1], labels, and a number each."""
    images, labels = load_digits(return_X_y=True)
    columns = (
        (images / 16).astype(np.float32).reshape(-1, 8, 8),
        labels.astype(np.int32),
        np.arange(len(labels), dtype=np.int32),
    )
    parts = train_test_split(*columns, test_size=0.2, stratify=labels, random_state=SEED)
    names = ("image", "label", "number")
    return dict(zip(names, parts[0::2], strict=True)), dict(zip(names, parts[1::2], strict=True))


# %% [markdown]
# ## Pipelines
#
# `jitter` is written for one image. It gets a key of its own for every image and epoch, so what it
# does to an image does not depend on the batch that the image lands in.
#
# `last_batch="drop"` keeps every batch at 64 rows: the loop and the compiled epoch then agree batch
# by batch, not only record by record.


# %%
def jitter(element, key):
    """Move a digit sideways by up to one pixel, and rub out a twentieth of it."""
    move, rub = jax.random.split(key)
    image = jnp.roll(element.data["image"], jax.random.randint(move, (), -1, 2), axis=1)
    kept = jax.random.bernoulli(rub, 0.95, image.shape)
    return element.update_data({"image": jnp.where(kept, image, 0)})


def augmentation() -> ElementOperator:
    return ElementOperator(ElementOperatorConfig(stochastic=True), fn=jitter)


def both_views(clean, augmented):
    """Two images for each digit: `(b, 8, 8)` twice becomes `(b, 2, 8, 8)`."""
    return clean | {"image": jnp.stack([clean["image"], augmented["image"]], axis=1)}


def chain(data) -> Pipeline:
    return Pipeline(
        source=MemorySource(MemorySourceConfig(shuffle=True), data),
        stages=[augmentation()],
        batch_size=BATCH_SIZE,
        last_batch="drop",
        rngs=nnx.Rngs(SEED),
    )


def graph(data) -> Pipeline:
    return Pipeline.from_dag(
        source=MemorySource(MemorySourceConfig(shuffle=True), data),
        nodes={"augment": augmentation(), "pair": both_views},
        edges={"augment": [], "pair": ["source", "augment"]},
        sink="pair",
        batch_size=BATCH_SIZE,
        last_batch="drop",
        rngs=nnx.Rngs(SEED),
    )


# %% [markdown]
# ## Model
#
# `train_step` is the only training code there is: the loop calls it for each batch, and `scan`
# compiles it into the epoch.


# %%
class Classifier(nnx.Module):
    """One hidden layer: `(..., 8, 8)` pixels to `(..., 10)` logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 256, rngs=rngs)
        self.out = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images.reshape(*images.shape[:-2], 64))))


def new_model() -> tuple[Classifier, nnx.Optimizer]:
    model = Classifier(nnx.Rngs(SEED))
    rate = optax.cosine_decay_schedule(5e-3, EPOCHS * EPOCH_BATCHES)
    return model, nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)


def train_step(model, optimizer, batch):
    """One update. Returns the loss, and the batch as evidence of what the model was shown."""

    def loss_of(model):
        logits = model(batch["image"].reshape(BATCH_SIZE, -1, 8, 8))
        labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return {"loss": loss, "batch": batch}


def accuracy(model, data) -> float:
    """The share of `data` that the model gets right, whether or not batches of 64 divide it."""

    def count(model, batch):
        right = jnp.argmax(model(batch["image"]), axis=-1) == batch["label"]
        return {"right": right & batch["mask"], "seen": batch["mask"]}

    pipeline = Pipeline(
        source=MemorySource(MemorySourceConfig(), data),
        stages=[],
        batch_size=BATCH_SIZE,
        last_batch="pad",  # the missing rows of the last batch are zero, and their mask is False
    )
    counts = jax.tree.map(jnp.sum, pipeline.scan(count, modules=(model,)))
    assert counts["seen"] == len(data["label"]), "a padded epoch shows every record exactly once"
    return float(counts["right"] / counts["seen"])


# %% [markdown]
# ## Training

# %%
compiled_step = nnx.jit(train_step)


def epoch_with_for(pipeline, model, optimizer):
    outs = [compiled_step(model, optimizer, batch) for batch in pipeline]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def epoch_with_scan(pipeline, model, optimizer):
    return pipeline.scan(train_step, modules=(model, optimizer))


def train(pipeline, model, optimizer, run_epoch, progress, title):
    """Train to the end of the last epoch: what the model saw, and the seconds each epoch took."""
    seen, seconds = [], []
    first = pipeline.cursor.epoch
    task = progress.add_task(title, total=EPOCHS, completed=first)
    for _ in range(first, EPOCHS):
        start = time.perf_counter()
        outs = jax.block_until_ready(run_epoch(pipeline, model, optimizer))
        seconds.append(time.perf_counter() - start)
        seen.append(outs["batch"])
        progress.advance(task)
    return jax.tree.map(lambda *epochs: np.concatenate(epochs), *seen), seconds


# %% [markdown]
# ## Saving and resuming
#
# A pipeline's state is JSON; the arrays of the model and the optimizer go into another file. The
# run that is interrupted takes its batches with `step()`, the one that resumes in a `for` loop.


# %%
def save(folder: Path, pipeline, model, optimizer):
    (folder / "pipeline.json").write_text(json.dumps(pipeline.get_state()))
    np.savez(folder / "model.npz", *jax.tree.leaves(nnx.state((model, optimizer))))


def restore(folder: Path, pipeline, model, optimizer):
    pipeline.set_state((folder / "pipeline.json").read_text())
    with np.load(folder / "model.npz") as saved:
        tree = jax.tree.structure(nnx.state((model, optimizer)))
        leaves = [jnp.asarray(saved[name]) for name in saved.files]
    nnx.update((model, optimizer), jax.tree.unflatten(tree, leaves))


def interrupted(folder: Path) -> None:
    """Train on the chain up to the middle of an epoch, save, and stop."""
    pipeline, (model, optimizer) = chain(digits()[0]), new_model()
    for _ in range(CUT):
        compiled_step(model, optimizer, pipeline.step())
    save(folder, pipeline, model, optimizer)


def resumed(folder: Path) -> None:
    """In another process: go on from there to the end, and save that too."""
    pipeline, (model, optimizer) = chain(digits()[0]), new_model()
    restore(folder, pipeline, model, optimizer)
    epoch, offset = pipeline.cursor
    console.print(f"a fresh process goes on in epoch {epoch}, after {offset} records of it")
    with Progress(console=console) as progress:
        seen, _ = train(pipeline, model, optimizer, epoch_with_for, progress, "the rest")
    save(folder, pipeline, model, optimizer)
    np.savez(folder / "seen.npz", **seen)


# %% [markdown]
# ## The run

# %%
console = Console(width=88)


def assert_identical(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def compare_modes():
    """Train on both pipelines in both modes; what each run saw, and its model and optimizer."""
    train_set, test_set = digits()
    table = Table("pipeline", "mode", "test accuracy", "first epoch", "later epochs, median")
    runs = {}
    with Progress(console=console) as progress:
        for build in (chain, graph):
            for mode, run_epoch in (("for", epoch_with_for), ("scan", epoch_with_scan)):
                name = f"{build.__name__}, {mode}"
                model, optimizer = new_model()
                seen, seconds = train(build(train_set), model, optimizer, run_epoch, progress, name)
                runs[name] = seen, (model, optimizer)

                share = accuracy(model, test_set)
                assert share >= ACCURACY, f"{name}: test accuracy {share:.3f} is below {ACCURACY}"
                table.add_row(
                    build.__name__,
                    mode,
                    f"{share:.3f}",
                    f"{seconds[0] * 1e3:.0f} ms",  # compiles
                    f"{statistics.median(seconds[1:]) * 1e3:.1f} ms",
                )
    console.print(table)
    return runs


def main():
    train_set, test_set = digits()
    console.rule("The data and the graph")
    learn, test = len(train_set["label"]), len(test_set["label"])
    console.print(f"{learn} digits to learn from, {test} to test")
    print(graph(train_set))

    console.rule(f"{EPOCHS} epochs, in a loop and compiled")
    runs = compare_modes()
    for name in ("chain", "graph"):
        assert_identical(runs[f"{name}, for"][0], runs[f"{name}, scan"][0])
    batches = len(runs["chain, for"][0]["label"])
    console.print(f"from each pipeline, both modes gave the same {batches} batches, bit for bit")

    console.rule("A run that is interrupted in the middle of an epoch")
    seen, trained = runs["chain, for"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        interrupted(folder)
        size = (folder / "pipeline.json").stat().st_size
        console.print(
            f"stopped after {CUT} batches of {batches}; the pipeline's state: {size} bytes"
        )
        subprocess.run([sys.executable, __file__, "--resume", folder], check=True)

        with np.load(folder / "seen.npz") as rest:
            assert_identical({name: leaf[CUT:] for name, leaf in seen.items()}, dict(rest))
        model, optimizer = new_model()
        restore(folder, chain(train_set), model, optimizer)
        assert_identical(nnx.state((model, optimizer)), nnx.state(trained))
    console.print(f"the other {batches - CUT} batches and every parameter: as if it never stopped")

    console.rule("The guide")
    runpy.run_path(str(GUIDE), run_name="__main__")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train on digits, in every mode.")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="finish the run saved there")
    folder = parser.parse_args().resume
    resumed(folder) if folder else main()
