"""`StreamingDiskSource` under the name it is known by elsewhere."""

from ._disk import (
    StreamingDiskSource as StreamingDiskSource,
    StreamingDiskSourceConfig as StreamingDiskSourceConfig,
)
