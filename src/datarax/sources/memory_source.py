"""`MemorySource` under the name it is known by elsewhere."""

from ._memory import MemorySource as MemorySource, MemorySourceConfig as MemorySourceConfig
