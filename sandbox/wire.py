"""Frames between the harness (trusted, outside) and a process in the box, over one inherited socket.

The box finds the socket's number in the environment variable ``HARNESS_FD``. A frame is one ASCII byte of kind,
a little-endian uint64 of length, and the payload. target_repo/harness.py speaks the other end.

A box that waits for its job says so first, and gets the job's command line, over the same socket
(sandbox/warm_inside.py, kinds ``r`` and ``g``). The job itself sees nothing of that.

Training (``train`` command)
    harness -> job   S  JSON {seed, steps, rows, sequence, vocab, preset, device, threads, check}
    job -> harness   ?  uint32 rows: asks for a batch (one step is charged)
    harness -> job   B  rows x (sequence + 1) uint16 token ids, or
    harness -> job   E  empty: the budget is spent
    job -> harness   P  JSON {step, loss}: for screens only
    job -> harness   W  the final weights as safetensors

Scoring (``serve`` command)
    harness -> job   S  JSON {rows, sequence, vocab, preset, device, threads}
    harness -> job   W  the weights as safetensors
    job -> harness   R  empty: ready
    harness -> job   A  uint32 n, uint32 c, then n x c uint16: prefixes of equal length c
    job -> harness   A  n x vocab float32: logits of the next token
    harness -> job   L  n x (sequence + 1) uint16: whole rows
    job -> harness   L  n x sequence float32: -log p of each next token, in nats
    harness -> job   E  empty: done
"""

from __future__ import annotations

import socket
import struct

HEADER = struct.Struct("<cQ")


class WireError(Exception):
    """The other end closed, broke the framing, or was larger or later than allowed."""


def send(sock: socket.socket, kind: bytes, payload: bytes | memoryview = b"") -> None:
    """Send one frame. Raises WireError when the other end is gone or the socket's timeout passed."""
    try:
        sock.sendall(HEADER.pack(kind, len(payload)))
        if payload:  # after the header of an empty frame the other end may be gone already, by right
            sock.sendall(payload)
    except (OSError, TimeoutError) as error:
        raise WireError(f"could not send {kind!r}: {error}") from error


def receive(sock: socket.socket, most: int) -> tuple[bytes, bytearray]:
    """Next frame as (kind, payload). Raises WireError on close, timeout, or a payload over ``most`` bytes."""
    kind, length = HEADER.unpack(read_exactly(sock, HEADER.size))
    if length > most:
        raise WireError(f"frame {kind!r} of {length} bytes is over the limit of {most}")
    return kind, read_exactly(sock, length)


def read_exactly(sock: socket.socket, count: int) -> bytearray:
    """Exactly ``count`` bytes."""
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        try:
            got = sock.recv_into(view[done:], min(count - done, 1 << 20))
        except (OSError, TimeoutError) as error:
            raise WireError(f"could not receive: {error}") from error
        if got == 0:
            raise WireError("the other end closed the connection")
        done += got
    return data
