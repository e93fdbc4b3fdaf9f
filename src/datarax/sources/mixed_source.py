"""`MixDataSourcesNode` under the name it is known by elsewhere."""

from ._mixture import (
    MixDataSourcesConfig as MixDataSourcesConfig,
    MixDataSourcesNode as MixDataSourcesNode,
)
