"""Alias: code written for other versions imports `MemorySource` from here."""

from ._memory import MemorySource as MemorySource, MemorySourceConfig as MemorySourceConfig
