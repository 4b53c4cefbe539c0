"""What can go wrong at a model's endpoint, one class a name: what the server does, and the word for it in the ledger.

Each is done by a real server on loopback, over real sockets: resets with SO_LINGER, streams that stall, bodies of
50 MB, a gzip of zeros. Three need no server of their own, only an address: one that refuses, one that speaks no TLS,
one that does not exist. Does not cover: a server that is merely slow, which no client can tell from a thinking model.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent.llm.scripted import (
    Delay,
    Disconnect,
    Drip,
    Empty,
    Fixed,
    Html,
    Raw,
    Say,
    Stall,
    Status,
    Truncate,
)

Pause = Callable[[float], None]
LONG = 120.0
"""Seconds that a silent server stays silent."""
MEGABYTES = 50


@dataclass(frozen=True, slots=True)
class FaultClass:
    """One class. ``kind``: what the ledger must say. ``address``: instead of the server's own, with {port}."""

    kind: str
    item: Fixed | None = None
    address: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys of [model]."""
    alone: bool = False
    """No other model goes on: the campaign must end by itself."""


def classes(key: str) -> dict[str, FaultClass]:
    """Name -> class. ``key`` is echoed in some errors, as real proxies do."""
    echo = f"upstream refused Authorization: Bearer {key}"
    stream = {"stream": True}
    return {
        "429 with Retry-After of an hour": FaultClass("rate limit", _error(429, "slow down", {"Retry-After": "3600"})),
        "429 with Retry-After of a second": FaultClass("rate limit", _error(429, "slow down", {"Retry-After": "1"})),
        "429 without Retry-After": FaultClass("rate limit", _error(429, "slow down")),
        "500 that echoes the key": FaultClass("server error", _error(500, echo)),
        "503": FaultClass("overloaded", _error(503, "down for maintenance")),
        "529": FaultClass("overloaded", _error(529, "overloaded")),
        "error inside a 200": FaultClass("server error", Status(200, {"error": {"code": 502, "message": "upstream"}})),
        "connection refused": FaultClass("no connection", address="http://127.0.0.1:1/v1"),
        "no such host": FaultClass("no connection", address="http://model.invalid/v1"),
        "connection reset": FaultClass("no connection", Raw(_reset)),
        "no HTTP at all": FaultClass("no connection", Raw(_no_http)),
        "TLS failure": FaultClass("tls", address="https://127.0.0.1:{port}/v1"),
        "silence before the answer": FaultClass("timeout", Delay(LONG, Say("late"))),
        "stall inside the answer": FaultClass("stalled", Stall(Say("x" * 400), LONG)),
        "slow drip": FaultClass("stalled", Drip(Say("x" * 4000), 0.1)),
        "disconnect inside the answer": FaultClass("no connection", Disconnect(Say("x" * 400), 40)),
        "stall inside a stream": FaultClass("stalled", Raw(_stream(pieces=3, silent=LONG)), settings=stream),
        "stream that ends early": FaultClass("cut off", Raw(_stream(pieces=3)), settings=stream),
        "stream of comments without end": FaultClass("stalled", Raw(_stream(pieces=0, comments=True)), settings=stream),
        "stream without end": FaultClass("too large", Raw(_stream(pieces=1 << 30)), settings=stream),
        "broken event in a stream": FaultClass("broken JSON", Raw(_stream(pieces=2, tail=b"data: {broken\n\n")),
                                               settings=stream),
        "reply of 50 MB": FaultClass("too large", Raw(_large)),
        "500 of 50 MB": FaultClass("too large", Raw(_large_error)),
        "gzip of zeros": FaultClass("too large", Raw(_bomb)),
        "truncated JSON": FaultClass("broken JSON", Truncate(Say("x" * 400))),
        "garbage": FaultClass("broken JSON", Status(200, "\x00\x01 not JSON {{{")),
        "web page": FaultClass("web page", Html()),
        "empty body": FaultClass("empty", Empty()),
        "no choices": FaultClass("no choices", Status(200, {"choices": []})),
        "no content": FaultClass("no content", _message({"content": None})),
        "refusal": FaultClass("refusal", _message({"content": None, "refusal": "I cannot help with that."})),
        "content filter": FaultClass("refusal", _message({"content": None}, "content_filter")),
        "refusal in prose": FaultClass("no patch", Say("I'm sorry, but I can't help with that.")),
        "token limit before the answer": FaultClass("cut off", _message({"content": None}, "length")),
        "token limit inside the patch": FaultClass("no patch", Say('{"title": "x", "edits": [{"path": "se', "length")),
        "JSON of another shape": FaultClass("no patch", Say({"answer": 42, "edits": "none"})),
        "another model answers": FaultClass("another model", Say({}, model="something-else")),
        "unknown model": FaultClass("unknown model", _error(404, "no such model")),
        "context overflow": FaultClass("context overflow", _error(400, "maximum context length is 8 tokens")),
        "key that expires": FaultClass("key refused", _error(401, echo)),
        "forbidden": FaultClass("key refused", _error(403, "not allowed")),
        "account without money": FaultClass("quota", _error(402, "pay first")),
        "quota as a 429": FaultClass("quota", _error(429, "You exceeded your quota", code="insufficient_quota")),
        "bad request": FaultClass("bad request", _error(400, "messages: wrong")),
        "key that expires, and nothing else": FaultClass("key refused", _error(401, "expired"), alone=True),
        "down for good, and nothing else": FaultClass("overloaded", _error(503, "down"), alone=True,
                                                      settings={"outage_hours": 0.001}),
    }


def _error(status: int, message: str, headers: dict[str, str] | None = None, code: str = "") -> Status:
    return Status(status, {"error": {"message": message, "code": code}}, headers or {})


def _message(message: dict[str, Any], finish: str = "stop") -> Status:
    return Status(200, {"choices": [{"message": message, "finish_reason": finish}]})


def _reset(connection: socket.socket, pause: Pause) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _no_http(connection: socket.socket, pause: Pause) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")


def _stream(pieces: int, silent: float = 0.0, comments: bool = False, tail: bytes = b"") -> Callable[
        [socket.socket, Pause], None]:
    """An event stream of ``pieces`` that never says it is finished."""
    def act(connection: socket.socket, pause: Pause) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        event = b"data: " + json.dumps({"choices": [{"delta": {"content": "x" * 2000}}]}).encode() + b"\n\n"
        for _ in range(pieces):
            connection.sendall(event)
        connection.sendall(tail)
        pause(silent)
        while comments:
            connection.sendall(b": still working\n\n")
            pause(0.1)
    return act


def _large_error(connection: socket.socket, pause: Pause) -> None:
    _large(connection, pause, b"500 Internal Server Error")


def _large(connection: socket.socket, pause: Pause, status: bytes = b"200 OK") -> None:
    size = MEGABYTES << 20
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % (status, size))
    for _ in range(MEGABYTES):
        connection.sendall(b" " * (1 << 20))


def _bomb(connection: socket.socket, pause: Pause) -> None:
    body = gzip.compress(bytes(MEGABYTES << 20))
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body))
    connection.sendall(body)
