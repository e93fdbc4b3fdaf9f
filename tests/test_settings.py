"""The settings of JAX are read, and respected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datarax import _settings
from datarax._settings import on_cpu, transferring

pytestmark = pytest.mark.internal("what users set shows in what they get, wherever it is read")


def test_the_device_is_the_one_that_was_chosen(monkeypatch):
    assert on_cpu()
    monkeypatch.setattr(_settings.jax, "default_backend", lambda: "gpu")
    assert not on_cpu()
    with jax.default_device(jax.devices("cpu")[0]):
        assert on_cpu()
    with jax.default_device("cpu"):
        assert on_cpu()


@pytest.mark.parametrize("guard", [jax.transfer_guard, jax.transfer_guard_host_to_device])
def test_what_is_transferred_on_purpose_passes_every_guard(guard):
    assert transferring() is transferring()  # without a guard, one object that does nothing
    with guard("disallow"):
        with transferring():
            assert jnp.asarray(np.ones(2)).tolist() == [1, 1]
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jnp.asarray(np.ones(2))
