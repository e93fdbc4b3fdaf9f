"""Strict everywhere: promotion, ranks and warnings are errors in every test."""

import os

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a property compiles, the others do not. No explanation: it
# costs many more examples than the failure itself.
PHASES = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
hypothesis.settings.register_profile("local", deadline=None, phases=PHASES)
hypothesis.settings.register_profile(
    "ci", deadline=None, phases=PHASES, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True, scope="session")
def no_look_ahead():
    """Whether `for` looks ahead depends on the clock; tests say it: `with ahead(batches):`."""
    from helpers import ahead  # here, so that datarax is imported with its types checked

    with ahead(1):
        yield


@pytest.fixture
def unchecked():
    """Types are not checked: for what a user may do wrong, and since beartype draws at random."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def standard_promotion():
    """Types are promoted as JAX does unless told otherwise: for what comes of a weak type."""
    with jax.numpy_dtype_promotion("standard"):
        yield
