"""JAX data pipelines whose behaviour is written down and can be checked."""

from . import (
    errors as errors,
    operators as operators,
    pipeline as pipeline,
    sources as sources,
)
from .pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
