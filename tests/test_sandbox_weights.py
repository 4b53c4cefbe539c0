"""Weights are parsed strictly, since their sender is not trusted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from sandbox.weights import BadWeights, inspect


def pack(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_is_read() -> None:
    data = safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)}, {"note": "x"})
    facts = inspect(data)
    assert (facts.parameters, facts.size, facts.nonfinite) == (11, len(data), ())


@pytest.mark.parametrize(("dtype", "bad", "good"), [
    ("F32", np.array([1, np.nan], "<f4").tobytes(), np.array([1, 3e38], "<f4").tobytes()),
    ("F16", np.array([np.inf, 1], "<f2").tobytes(), np.array([65504, 1], "<f2").tobytes()),
    ("BF16", b"\x80\x3f\xc0\x7f", b"\x80\x3f\x7f\x7f"),
    ("BF16", b"\x80\xff\x00\x00", b"\x7f\xff\x00\x00"),
])
def test_nonfinite_tensors_are_named(dtype: str, bad: bytes, good: bytes) -> None:
    header = {"w": entry(0, len(bad), [2], dtype)}
    assert inspect(pack(header, bad)).nonfinite == ("w",)
    if good != b"\x7f\xff\x00\x00":
        assert inspect(pack(header, good)).nonfinite == ()


@pytest.mark.parametrize("data", [
    b"", b"\x01", (1 << 60).to_bytes(8, "little") + b"{}", pack(b"[]"), pack(b"{"), pack({}), pack(b"[" * 100_000),
    pack({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"\0" * 4),
    pack({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"\0" * 12),
    pack({"a": entry(0, 4, [1])}, b"\0" * 5), pack({"a": entry(0, 4, [1])}, b"\0" * 3),
    pack({"a": entry(0, 4, [2])}, b"\0" * 4), pack({"a": entry(0, 4, [-1])}, b"\0" * 4),
    pack({"a": entry(0, 0, [1 << 62, 4])}), pack({"a": entry(0, 4, [True])}, b"\0" * 4),
    pack({"a": entry(0, 4, [1], "F31")}, b"\0" * 4), pack({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    pack(b'{"a":' + json.dumps(entry(0, 4, [1])).encode() + b',"a":' + json.dumps(entry(0, 4, [1])).encode() + b"}",
         b"\0" * 4),
    b"\x80\x04\x95" + b"\0" * 50,
])
def test_malformed_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadWeights):
        inspect(data)
