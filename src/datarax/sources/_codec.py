"""Encoding of records as bytes, without pickle (spec SRC-035)."""

import io
import zipfile
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from .._extras import require
from .._types import Batch, flat_fields
from ._values import as_record

Decode: TypeAlias = Literal["msgpack", "npz"] | Callable[[bytes], Any]


def encode(record: Batch, form: Literal["msgpack", "npz"] = "msgpack") -> bytes:
    """A record as bytes that `ArrayRecordSource` decodes.

    Args:
        record: a dict of arrays and numbers. Nested fields are decoded under dotted names:
            `{"a": {"b": x}}` becomes `{"a.b": x}`.
        form: "msgpack" (extra "array_record"), or "npz", a zip file with a checksum of each field.

    Raises:
        TypeError: a field that is not of a numeric NumPy type; bfloat16 is none.
        ValueError: an unknown `form`, or two fields with one dotted name.
    """
    if form not in DECODERS:
        raise ValueError(f"`form` is one of {sorted(DECODERS)}, got {form!r}.")
    record = as_record(record, None)
    fields = {name: np.asarray(x) for name, x in flat_fields(record).items()}
    if len(fields) < len(jax.tree.leaves(record)):
        raise ValueError(f"Two fields have one name where nested ones are joined: {list(fields)}.")
    for name, x in fields.items():
        if x.dtype.kind not in "biufc":
            raise TypeError(
                f"Field {name!r} must hold numbers of a type of NumPy's own, got {x.dtype}. Encode "
                "text as numbers, and bfloat16 as float32, or as `x.view(np.uint16)` that `decode` "
                "views back."
            )
    if form == "npz":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:  # `np.savez` fails for a field named "file"
            for name, x in fields.items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, x, allow_pickle=False)
        return buffer.getvalue()
    little = {name: x.astype(x.dtype.newbyteorder("<")) for name, x in fields.items()}
    packed = {name: [x.dtype.str, list(x.shape), x.tobytes()] for name, x in little.items()}
    return require("msgpack", "array_record").Packer().pack(packed)


def decode_msgpack(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of `encode` with "msgpack"."""
    fields = require("msgpack", "array_record").unpackb(data, strict_map_key=True)
    if not isinstance(fields, dict):
        raise ValueError("a record must be a msgpack map of fields [type, shape, bytes]")
    record = {}
    for name, (dtype, shape, raw) in fields.items():
        if np.dtype(dtype).kind not in "biufc":
            raise ValueError(f"field {name!r} holds {dtype!r}, which are no numbers")
        record[name] = np.frombuffer(raw, np.dtype(dtype)).reshape(shape)
    return record


def decode_npz(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` archive; the zip format verifies a checksum of each."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        # Full file names are unambiguous: NpzFile also finds "x.npy" under the name "x".
        return {name.removesuffix(".npy"): archive[name] for name in archive.zip.namelist()}


DECODERS: dict[str, Callable[[bytes], Any]] = {"msgpack": decode_msgpack, "npz": decode_npz}
