"""Checks a data pipeline engine against the Datarax specification."""

from .adapter import Adapter as Adapter, Program as Program, Stream as Stream
from .api import run_conformance as run_conformance
from .ops import Op as Op, Ops as Ops
from .version import VERSION

__version__ = VERSION
