"""Golden vectors: frozen numbers that every producer of our keys and our order must reproduce.

`order/<N>.json` has the order of N records for some seeds and epochs; `keys/*.json` the block
function, folding, and chains from a seed to a record. `MANIFEST.json` has the SHA-256 of each file.
Stored states and published results refer to these numbers, so a build adds files and changes none.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import model

HERE = Path(__file__).parent
MANIFEST = HERE / "MANIFEST.json"

WHOLE = 1025  # up to this many records an order is stored whole, above it is sampled
DIGESTED = 2**20 + 1  # up to this many records the whole of one order is stored as a digest
LENGTHS = sorted(
    {1, 2, 3, 5, 10, 33, 100, 1000, 10**9, 2**32 - 1, 2**40}
    | {2**k + d for k in range(1, 21) for d in (-1, 0, 1)}
)
PLACES = [  # (seed, epoch); the last words of each range, and seeds that differ in the top bit only
    (0, 0),
    (0, 1),
    (1, 0),
    (42, 0),
    (42, 1),
    (2**31, 0),
    (2**31 + 42, 1),
    (2**32 - 1, 2**32 - 1),
]
DIGEST_PLACE = (42, 1)


def sample(length: int) -> list[int]:
    """The offsets that are stored of a long order: the first 8, the last 8, and 48 between."""
    between = (i * length // 49 for i in range(1, 49))
    return sorted({*range(8), *between, *range(length - 8, length)})


def digest_of_order(records: np.ndarray) -> str:
    """SHA-256 of the records as little-endian 32-bit words."""
    return hashlib.sha256(np.asarray(records).astype("<u4").tobytes()).hexdigest()


def order_vectors(length: int) -> dict[str, Any]:
    cases = []
    for seed, epoch in PLACES:
        key = model.epoch_key(model.base_key(seed), epoch)
        case: dict[str, Any] = {"seed": seed, "epoch": epoch}
        offsets: Iterable[int] = range(length)
        if length > WHOLE:
            case["offsets"] = offsets = sample(length)
        case["records"] = model.order(key, length, list(offsets)).tolist()
        if WHOLE < length <= DIGESTED and (seed, epoch) == DIGEST_PLACE:
            case["sha256"] = digest_of_order(model.order(key, length, range(length)))
        cases.append(case)
    requirement = "SHUF-013" if length < 2**32 else "SHUF-014"
    return {"requirement": requirement, "length": length, "cases": cases}


def words(key: model.Key) -> list[int]:
    return [int(word) for word in key]


def threefry_vectors() -> dict[str, Any]:
    """The three published known answers of the cipher, and some in the range of ours."""
    most = 2**32 - 1
    inputs = [
        ((0, 0), (0, 0)),
        ((most, most), (most, most)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)),
        ((0, 42), (0, 1)),
        ((0, 1), (0, 42)),
        ((most, 0), (0, most)),
    ]
    cases = [
        {"key": list(k), "count": list(c), "words": words(model.threefry2x32(k, c))}
        for k, c in inputs
    ]
    return {"requirement": "KEYS-001", "cases": cases}


def fold_in_vectors() -> dict[str, Any]:
    numbers = [0, 1, 23, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1]
    keys = [(0, 0), (0, 42), (0xDEADBEEF, 0x01234567)]
    cases = [
        {"key": list(key), "number": number, "words": words(model.fold_in(key, number))}
        for key in keys
        for number in numbers
    ]
    return {"requirement": "KEYS-003", "cases": cases}


def chain_vectors() -> dict[str, Any]:
    """From a seed by way of node and epoch to a record."""
    cases = []
    for seed in (0, 42, 2**32 - 1):
        for node in ("source", "augment", "augment_1", "größe"):
            for epoch, record in ((0, 0), (0, 7), (1, 7), (2**32 - 1, 2**40 + 7)):
                node_key = model.node_key(model.base_key(seed), node)
                epoch_key = model.fold_in(node_key, epoch)
                cases.append(
                    {
                        "seed": seed,
                        "node": node,
                        "epoch": epoch,
                        "record": record,
                        "node_key": words(node_key),
                        "epoch_key": words(epoch_key),
                        "record_key": words(model.fold_in(epoch_key, record)),
                    }
                )
    return {"requirement": "KEYS-006", "cases": cases}


def made() -> Iterator[tuple[str, str]]:
    """Every vector file, by name and text, as the model makes it."""
    for length in LENGTHS:
        yield f"order/{length}.json", as_text(order_vectors(length))
    yield "keys/threefry.json", as_text(threefry_vectors())
    yield "keys/fold_in.json", as_text(fold_in_vectors())
    yield "keys/chain.json", as_text(chain_vectors())


def as_text(vectors: dict[str, Any]) -> str:
    """JSON with one case on a line."""
    head = json.dumps({k: v for k, v in vectors.items() if k != "cases"})[:-1]
    lines = ",\n".join(
        json.dumps(case, separators=(",", ":"), ensure_ascii=False) for case in vectors["cases"]
    )
    return f'{head}, "cases": [\n{lines}\n]}}\n'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def manifest() -> dict[str, str]:
    """The files and their digests, as committed."""
    return json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}


def load(name: str) -> dict[str, Any]:
    """One file of vectors, for example `load("order/33.json")`."""
    return json.loads((HERE / name).read_text())


def build() -> None:
    frozen = manifest()
    files = dict(made())
    for name, text in files.items():
        if frozen.get(name, sha256(text)) != sha256(text):
            raise SystemExit(f"{name} is frozen, and the model now makes other numbers.")
    for name, text in files.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text)
    digests = {name: sha256(text) for name, text in files.items()}
    MANIFEST.write_text(json.dumps(digests, indent=1) + "\n")


def check() -> list[str]:
    """Every file that is missing, unlisted, damaged, or not what the model makes."""
    listed = manifest()
    stored = {path.relative_to(HERE).as_posix() for path in HERE.glob("*/*.json")}
    faults = [f"{name} is not in the manifest" for name in sorted(stored - listed.keys())]
    faults += [f"{name} is missing" for name in sorted(listed.keys() - stored)]
    files = dict(made())
    for name in sorted(stored & listed.keys()):
        text = (HERE / name).read_text()
        if sha256(text) != listed[name]:
            faults.append(f"{name} is not the file that the manifest lists")
        if text != files.get(name):
            faults.append(f"{name} is not what the model makes")
    return faults
