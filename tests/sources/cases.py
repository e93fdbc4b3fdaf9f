"""One table of sources over the same records. The tests in tests/sources/ check all of them."""

import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from datarax.sources import (
    ArrayRecordSource,
    ArrayRecordSourceConfig,
    ArrowSource,
    ArrowSourceConfig,
    EagerSourceBase,
    HFEagerSource,
    HFEagerSourceConfig,
    MemorySource,
    MemorySourceConfig,
    RandomAccessSource,
    RandomAccessSourceConfig,
    StreamingDiskSource,
    StreamingDiskSourceConfig,
    TFDSEagerSource,
    TFDSEagerSourceConfig,
    encode,
)

N = 23


def columns(n: int = N) -> dict[str, np.ndarray]:
    """Records whose number can be told from each of their fields."""
    ids = np.arange(n, dtype=np.int32)
    return {"id": ids, "x": np.float32(ids[:, None] * 3 + np.arange(3))}


def rows(n: int = N) -> list[dict[str, np.ndarray]]:
    data = columns(n)
    return [{name: x[i] for name, x in data.items()} for i in range(n)]


def npy_folder(folder: Path, n: int = N) -> Path:
    for name, x in columns(n).items():
        np.save(folder / f"{name}.npy", x)
    return folder


def array_record(path: Path, records: list[bytes]) -> Path:
    module = pytest.importorskip(
        "array_record.python.array_record_module", reason="needs the extra 'array_record'"
    )
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def arrow_table(n: int = N):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    data = columns(n)
    tensor = pa.FixedSizeListArray.from_arrays(pa.array(data["x"].ravel()), 3)
    return pa.table({"id": data["id"], "x": tensor})


def parquet(path: Path, n: int = N, group: int = 5) -> Path:
    table = arrow_table(n)
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path, row_group_size=group, write_page_checksum=True)
    return path


def arrow_file(path: Path, n: int = N) -> Path:
    table = arrow_table(n)
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def prepared_tfds(folder: Path, n: int = N, fields: Sequence[tuple[str, Any, Any]] = ()) -> Path:
    """A prepared data set of `n` records; `fields` adds fields, each with its type and value."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra 'tfds'")

    with tfds.core.registered.skip_registration():

        class Numbers(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "id": tfds.features.Scalar(np.int32),
                    "x": tfds.features.Tensor(shape=(3,), dtype=np.float32),
                } | {name: kind for name, kind, _ in fields}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                values = {name: value for name, _, value in fields}
                yield from enumerate(row | values for row in rows(n))

    builder = Numbers(data_dir=str(folder), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return Path(os.fspath(builder.data_path))


def hf_dataset(n: int = N):
    datasets = pytest.importorskip("datasets", reason="needs the extra 'hf'")
    data = columns(n)
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "x": datasets.Sequence(datasets.Value("float32"), length=3),
        }
    )
    return datasets.Dataset.from_dict({k: x.tolist() for k, x in data.items()}, features)


@dataclasses.dataclass(frozen=True)
class Case:
    """`prepare(folder)` writes the files and returns a function from `shuffle` to a source."""

    name: str
    prepare: Callable[[Path], Callable[..., EagerSourceBase]]

    def __str__(self) -> str:
        return self.name


def memory(folder):
    return lambda rngs=None, **kw: MemorySource(MemorySourceConfig(**kw), columns(), rngs=rngs)


def disk(folder):
    path = npy_folder(folder)
    return lambda rngs=None, **kw: StreamingDiskSource(
        StreamingDiskSourceConfig(path=path, **kw), rngs=rngs
    )


def disk_parts(folder):
    paths, ends = [], (0, 9, 9, 20, N)
    for begin, end in itertools.pairwise(ends):
        paths.append(folder / str(len(paths)))
        paths[-1].mkdir()
        for name, x in columns().items():
            np.save(paths[-1] / f"{name}.npy", x[begin:end])
    return lambda rngs=None, **kw: StreamingDiskSource(
        StreamingDiskSourceConfig(path=paths, **kw), rngs=rngs
    )


def array_records(folder):
    data = [encode(row) for row in rows()]
    paths = (
        array_record(folder / "0.array_record", data[:9]),
        array_record(folder / "1.array_record", data[9:]),
    )
    return lambda rngs=None, **kw: ArrayRecordSource(
        ArrayRecordSourceConfig(paths=paths, **kw), rngs=rngs
    )


def npz_records(folder):
    path = array_record(folder / "0.array_record", [encode(row, "npz") for row in rows()])
    return lambda rngs=None, **kw: ArrayRecordSource(
        ArrayRecordSourceConfig(paths=path, decode="npz", **kw), rngs=rngs
    )


def parquets(folder):
    path = parquet(folder / "data.parquet")
    return lambda rngs=None, **kw: ArrowSource(ArrowSourceConfig(paths=path, **kw), rngs=rngs)


def arrows(folder):
    arrow_file(folder / "data.arrow")
    return lambda rngs=None, **kw: ArrowSource(ArrowSourceConfig(paths=folder, **kw), rngs=rngs)


def decoded_parquets(folder):
    pa = pytest.importorskip("pyarrow", reason="needs the extra 'arrow'")
    import pyarrow.parquet

    data = {"id": columns()["id"], "raw": [x.tobytes() for x in columns()["x"]]}
    pyarrow.parquet.write_table(pa.table(data), folder / "data.parquet", row_group_size=7)
    return lambda rngs=None, **kw: ArrowSource(
        ArrowSourceConfig(paths=folder, decode=from_bytes, **kw), rngs=rngs
    )


def from_bytes(row):
    return {"id": np.int32(row["id"]), "x": np.frombuffer(row["raw"], np.float32)}


def objects(folder):
    data = rows()
    return lambda rngs=None, **kw: RandomAccessSource(
        RandomAccessSourceConfig(**kw), data, rngs=rngs
    )


def torch_dataset(folder):
    torch = pytest.importorskip("torch", reason="needs torch")
    data = columns()
    dataset = torch.utils.data.TensorDataset(*(torch.from_numpy(x) for x in data.values()))
    return lambda rngs=None, **kw: RandomAccessSource(
        RandomAccessSourceConfig(fields=("id", "x"), **kw), dataset, rngs=rngs
    )


def grain_source(folder):
    grain = pytest.importorskip("grain", reason="needs grain")
    data = grain.MapDataset.source(rows())
    return lambda rngs=None, **kw: RandomAccessSource(
        RandomAccessSourceConfig(**kw), data, rngs=rngs
    )


def hf(folder):
    hf_dataset().save_to_disk(str(folder / "hf"))
    return lambda rngs=None, **kw: HFEagerSource(
        HFEagerSourceConfig(path=folder / "hf", **kw), rngs=rngs
    )


def tfds(folder):
    path = prepared_tfds(folder)
    return lambda rngs=None, **kw: TFDSEagerSource(
        TFDSEagerSourceConfig(path=path, **kw), rngs=rngs
    )


HOST = [
    Case(prepare.__name__, prepare)
    for prepare in (
        disk,
        disk_parts,
        array_records,
        npz_records,
        parquets,
        arrows,
        decoded_parquets,
        objects,
        torch_dataset,
        grain_source,
        hf,
        tfds,
    )
]
ALL = [Case("memory", memory), *HOST]


def seeded(seed: int = 7) -> nnx.Rngs:
    return nnx.Rngs(seed)
