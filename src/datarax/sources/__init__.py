from .._order import Blocks as Blocks, Order as Order
from ._array_record import (
    ArrayRecordSource as ArrayRecordSource,
    ArrayRecordSourceConfig as ArrayRecordSourceConfig,
)
from ._arrow import ArrowSource as ArrowSource, ArrowSourceConfig as ArrowSourceConfig
from ._base import EagerSourceBase as EagerSourceBase, SourceData as SourceData
from ._codec import encode as encode
from ._disk import (
    StreamingDiskSource as StreamingDiskSource,
    StreamingDiskSourceConfig as StreamingDiskSourceConfig,
)
from ._hf import (
    HFEagerSource as HFEagerSource,
    HFEagerSourceConfig as HFEagerSourceConfig,
    HFStreamingSource as HFStreamingSource,
    HFStreamingSourceConfig as HFStreamingSourceConfig,
)
from ._host import HostSource as HostSource, HostSourceConfig as HostSourceConfig
from ._iterable import (
    IterableSource as IterableSource,
    IterableSourceConfig as IterableSourceConfig,
    Stream as Stream,
    StreamSource as StreamSource,
    StreamSourceConfig as StreamSourceConfig,
)
from ._memory import (
    MemorySource as MemorySource,
    MemorySourceConfig as MemorySourceConfig,
)
from ._mixture import (
    MixDataSourcesConfig as MixDataSourcesConfig,
    MixDataSourcesNode as MixDataSourcesNode,
)
from ._random_access import (
    RandomAccessSource as RandomAccessSource,
    RandomAccessSourceConfig as RandomAccessSourceConfig,
)
from ._reader import Reader as Reader
from ._tfds import (
    TFDSEagerSource as TFDSEagerSource,
    TFDSEagerSourceConfig as TFDSEagerSourceConfig,
    TFDSStreamingSource as TFDSStreamingSource,
    TFDSStreamingSourceConfig as TFDSStreamingSourceConfig,
)
