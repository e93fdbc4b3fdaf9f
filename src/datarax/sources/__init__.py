from ._base import EagerSourceBase as EagerSourceBase, SourceData as SourceData
from ._memory import (
    MemorySource as MemorySource,
    MemorySourceConfig as MemorySourceConfig,
)
