"""Alias: code written for other versions imports `MixDataSourcesNode` from here."""

from ._mixture import (
    MixDataSourcesConfig as MixDataSourcesConfig,
    MixDataSourcesNode as MixDataSourcesNode,
)
