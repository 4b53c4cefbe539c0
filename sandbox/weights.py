"""The weights that a job hands over: untrusted bytes, checked before anything else reads them.

Format: safetensors (https://huggingface.co/docs/safetensors), that is uint64 header length, JSON header, data. The
library accepts duplicate keys and knows nothing of NaN, so the header is parsed strictly here.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
         "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
MOST_HEADER = 16 << 20
MOST_TENSORS = 100_000
CHUNK = 1 << 24


class BadWeights(Exception):
    """The bytes are not one well-formed safetensors file."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Name, dtype, number of elements, and where its bytes lie in the data."""

    name: str
    dtype: str
    count: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Weights:
    """Facts about weights that are well formed."""

    parameters: int
    size: int
    sha256: str
    nonfinite: tuple[str, ...]


def inspect(data: bytes | bytearray) -> Weights:
    """Check ``data`` whole: format, then every floating-point tensor for NaN and infinity. Raises BadWeights."""
    tensors, start = parse(data)
    body = memoryview(data)[start:]
    bad = tuple(item.name for item in tensors if not _finite(item, body[item.begin:item.end]))
    return Weights(sum(item.count for item in tensors), len(data), hashlib.sha256(data).hexdigest(), bad)


def parse(data: bytes | bytearray) -> tuple[list[Tensor], int]:
    """(tensors in the order of their bytes, offset of the data). Raises BadWeights."""
    if len(data) < 8:
        raise BadWeights("shorter than its header length")
    length = int.from_bytes(data[:8], "little")
    if length > min(MOST_HEADER, len(data) - 8):
        raise BadWeights(f"header length {length} does not fit in {len(data)} bytes")
    try:
        header = json.loads(bytes(data[8:8 + length]), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"header is not valid JSON ({error})") from error
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise BadWeights("header is not a table of at most 100000 tensors")
    header.pop("__metadata__", None)
    if not header:
        raise BadWeights("holds no tensor")
    tensors = sorted((_tensor(name, entry) for name, entry in header.items()), key=lambda item: (item.begin, item.end))
    place = 0
    for item in tensors:
        if item.begin != place:
            raise BadWeights(f"bytes of {item.name[:80]!r} overlap others or leave a hole")
        place = item.end
    if place != len(data) - 8 - length:
        raise BadWeights(f"describes {place} bytes of data and has {len(data) - 8 - length}")
    return tensors, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadWeights("a name appears twice in the header")
    return table


def _tensor(name: str, entry: Any) -> Tensor:
    """One header entry. Raises BadWeights."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadWeights(f"entry {name[:80]!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in SIZES:
        raise BadWeights(f"{name[:80]!r} has unknown dtype {str(dtype)[:20]!r}")
    if not (_naturals(shape) and len(shape) <= 16 and _naturals(offsets) and len(offsets) == 2):
        raise BadWeights(f"{name[:80]!r} has a bad shape or bad offsets")
    count = math.prod(shape)
    if offsets[1] - offsets[0] != count * SIZES[dtype]:
        raise BadWeights(f"{name[:80]!r} has offsets that do not fit its shape")
    return Tensor(name[:200], dtype, count, offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _finite(tensor: Tensor, data: memoryview) -> bool:
    """False when a floating-point tensor holds NaN or infinity (8-bit floats are not looked into)."""
    for begin in range(0, len(data), CHUNK):
        part = data[begin:begin + CHUNK]
        if tensor.dtype == "BF16":
            good = ((np.frombuffer(part, "<u2") & 0x7F80) != 0x7F80).all()
        elif tensor.dtype in ("F16", "F32", "F64"):
            good = np.isfinite(np.frombuffer(part, f"<f{SIZES[tensor.dtype]}")).all()
        else:
            return True
        if not good:
            return False
    return True
