"""Alias: code written for other versions imports `StreamingDiskSource` from here."""

from ._disk import (
    StreamingDiskSource as StreamingDiskSource,
    StreamingDiskSourceConfig as StreamingDiskSourceConfig,
)
