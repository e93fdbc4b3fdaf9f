# %% [markdown]
# # DAG pipeline fundamentals
#
# A `Pipeline` is a source and a graph of stages. There are two ways to write the graph:
#
# - a **chain**: `Pipeline(source=..., stages=[...])`, where each stage feeds the next;
# - a **graph**: `Pipeline.from_dag(source=..., nodes={...}, edges={...}, sink=...)`, where every
#   stage has a name, and `edges` says which others it reads.
#
# Both are the same inside and are consumed the same way. This guide builds one of each over the
# same images and looks at what comes out.
#
# ## Data
#
# 64 colour images of 32 by 32 pixels, each with a label. Any dict of arrays with one row per record
# will do.

# %%
import jax
import numpy as np

print(f"JAX version: {jax.__version__}")

random = np.random.default_rng(0)
data = {
    "image": random.uniform(size=(64, 32, 32, 3)).astype(np.float32),
    "label": random.integers(0, 10, size=64, dtype=np.int32),
}

# %% [markdown]
# ## Part 1: a chain
#
# `normalize` is written for a single element; `ElementOperator` maps it over the rows of a batch.
# It is not stochastic, so it gets no key.

# %%
from flax import nnx
from datarax.operators import ElementOperator, ElementOperatorConfig
from datarax.pipeline import Pipeline
from datarax.sources import MemorySource, MemorySourceConfig


def normalize(element, key=None):
    del key
    image = element.data["image"]
    return element.update_data({"image": (image - 0.5) / 0.5})


normalize_op = ElementOperator(
    ElementOperatorConfig(stochastic=False),
    fn=normalize,
    rngs=nnx.Rngs(0),
)
source = MemorySource(MemorySourceConfig(), data=data, rngs=nnx.Rngs(0))
linear_pipeline = Pipeline(
    source=source,
    stages=[normalize_op],
    batch_size=16,
    rngs=nnx.Rngs(0),
)

# %% [markdown]
# `step()` hands over the next batch and moves on by `batch_size` records.

# %%
print(f"Source: {len(source)} samples")
linear_batch = linear_pipeline.step()
print(f"Linear pipeline output: image shape={linear_batch['image'].shape}")

# %% [markdown]
# ## Part 2: a graph
#
# Two stages read the source, each on its own, and a third puts their results side by side.
# A stage is called with one batch for each of its predecessors, in the order in which `edges` lists
# them; an empty list reads the source.

# %%
import jax.numpy as jnp


class _Augment(nnx.Module):
    """Multiplicative brightness jitter."""

    def __init__(self, factor: float = 1.2) -> None:
        self.factor = jnp.float32(factor)

    def __call__(self, batch):
        return {**batch, "image": batch["image"] * self.factor}


class _Normalize(nnx.Module):
    """Standardise to zero-mean unit-variance."""

    def __call__(self, batch):
        return {**batch, "image": (batch["image"] - 0.5) / 0.5}


class _StackBranches(nnx.Module):
    """Merge two batches by stacking the image fields."""

    def __call__(self, augmented, clean):
        return {
            "image": jnp.stack([augmented["image"], clean["image"]], axis=1),
            "label": augmented["label"],
        }


nodes = {
    "augment": _Augment(),
    "normalize": _Normalize(),
    "stack": _StackBranches(),
}
edges = {
    "augment": [],  # consumes source directly
    "normalize": [],  # consumes source directly
    "stack": ["augment", "normalize"],  # merges both branches
}
dag_pipeline = Pipeline.from_dag(
    source=source,
    nodes=nodes,
    edges=edges,
    sink="stack",
    batch_size=16,
    rngs=nnx.Rngs(0),
)

# %% [markdown]
# The shapes are known before the first batch. A notebook shows a pipeline as it is shown here:
# `print(dag_pipeline)` prints the table as text, `dag_pipeline.to_mermaid()` returns the picture.

# %%
dag_pipeline

# %% [markdown]
# Both branches of a row come from the same record, so the new axis pairs each augmented image with
# its clean one.

# %%
dag_batch = dag_pipeline.step()
print(f"DAG pipeline output: image shape={dag_batch['image'].shape}")

# %% [markdown]
# ## Part 3: the order in which stages run
#
# You declare what each stage reads, never when it runs. Every stage runs after all that it reads;
# where that leaves a choice, the one declared first goes first. `pipeline.stages` lists them in
# that order. Edges that form a cycle are a `ValueError` when the pipeline is built, and its message
# shows the cycle.

# %%
print(f"Linear pipeline: {len(linear_pipeline.stages)} stages")
print(f"DAG pipeline: {len(dag_pipeline.stages)} stages")

# %% [markdown]
# ## Part 4: which one to use
#
# Write a **chain** while every stage has one input and one reader: most augmentation is like that.
# Write a **graph** when a batch has several readers, when a stage has several inputs, or when you
# want names by which to inspect and replace stages.
#
# Nothing else depends on the choice: `step`, `for` and `scan` work on both, and equal topologies
# compile to the same program.
#
# ## A whole epoch
#
# A `for` loop runs to the end of an epoch. Above, `step()` took the first batch, so both pipelines
# are first moved back to the beginning.

# %%
print("DAG Pipeline Fundamentals Guide")
print("=" * 50)

linear_pipeline.reset()
processed = sum(batch["image"].shape[0] for batch in linear_pipeline)
print(f"Linear: processed {processed} samples")

dag_pipeline.reset()
processed = sum(batch["image"].shape[0] for batch in dag_pipeline)
print(f"DAG: processed {processed} samples")

print("Guide completed successfully!")
