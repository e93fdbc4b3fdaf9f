from .._order import Blocks as Blocks
from ._base import EagerSourceBase as EagerSourceBase, SourceData as SourceData
from ._disk import (
    StreamingDiskSource as StreamingDiskSource,
    StreamingDiskSourceConfig as StreamingDiskSourceConfig,
)
from ._host import HostSource as HostSource, HostSourceConfig as HostSourceConfig, Reader as Reader
from ._memory import (
    MemorySource as MemorySource,
    MemorySourceConfig as MemorySourceConfig,
)
