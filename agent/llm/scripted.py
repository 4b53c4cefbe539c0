"""A scripted model: an OpenAI-compatible HTTP server on loopback that answers from a list, faults included.

It is how a whole campaign is tried without a model: the client, the sockets and the failures are real. Items are used
up in order, one a request; when none is left, ``then`` answers (a 503 by default). An item may be a function of the
request body, for answers that depend on what was asked.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, slots=True)
class Say:
    """A chat completion with ``text`` (a dict is sent as its JSON)."""

    text: str | dict[str, Any]
    finish_reason: str = "stop"
    usage: Mapping[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 20})
    model: str = "scripted"

    def body(self) -> bytes:
        content = self.text if isinstance(self.text, str) else json.dumps(self.text)
        answer: dict[str, Any] = {
            "id": "scripted", "object": "chat.completion", "created": 0, "model": self.model,
            "choices": [{"index": 0, "finish_reason": self.finish_reason,
                         "message": {"role": "assistant", "content": content}}]}
        if self.usage is not None:
            answer["usage"] = dict(self.usage)
        return json.dumps(answer).encode()


@dataclass(frozen=True, slots=True)
class Status:
    """Any status with any body (a dict is sent as JSON): errors, and odd 200s such as ``{"choices": []}``."""

    code: int
    body: str | Mapping[str, Any] = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Html:
    """A 200 with a web page, as a captive portal or a misdirected proxy sends."""

    page: str = "<html><body>Welcome</body></html>"


@dataclass(frozen=True, slots=True)
class Empty:
    """A 200 without a body."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """A whole HTTP answer whose JSON stops half way."""

    item: Say


@dataclass(frozen=True, slots=True)
class Disconnect:
    """The connection drops: before the status line, or after ``after`` bytes of the body of ``item``."""

    item: Say | None = None
    after: int = 0


@dataclass(frozen=True, slots=True)
class Stall:
    """Headers and ``after`` bytes of the body of ``item``, then silence for ``seconds``."""

    item: Say
    seconds: float
    after: int = 20


@dataclass(frozen=True, slots=True)
class Drip:
    """The body of ``item`` one byte every ``pause`` seconds: no single read is late, the whole is."""

    item: Say
    pause: float


@dataclass(frozen=True, slots=True)
class Raw:
    """Whatever ``act`` does with the connection, which is closed afterwards. It is given the socket and a sleep that
    ends when the server closes."""

    act: Callable[[socket.socket, Callable[[float], None]], None]


@dataclass(frozen=True, slots=True)
class Delay:
    """``item``, but only after ``seconds``."""

    seconds: float
    item: Item


Fixed = Say | Status | Html | Empty | Truncate | Disconnect | Stall | Drip | Raw | Delay
Item = Fixed | Callable[[dict[str, Any]], Fixed]


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came. ``prompt`` is all its message text."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return "\n".join(str(message.get("content", "")) for message in self.body.get("messages", []))


class ScriptedModel:
    """The server, as a context manager. ``base_url`` goes into ``model.base_url``; ``requests`` is what came."""

    def __init__(self, script: Sequence[Item], then: Item | None = None, port: int = 0) -> None:
        """``port``: where it listens; any free one if left out."""
        self.requests: list[Request] = []
        self._script = list(script)
        self._then: Item = then or Status(503, {"error": {"message": "the script is at its end"}})
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.model = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def left(self) -> int:
        """Items not yet used."""
        return len(self._script)

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def pause(self, seconds: float) -> None:
        """Sleep that ends when the server closes."""
        self._closing.wait(seconds)

    def take(self, request: Request) -> Fixed:
        """Record ``request`` and use up the next item."""
        with self._lock:
            self.requests.append(request)
            item = self._script.pop(0) if self._script else self._then
        return item if isinstance(item, Fixed) else item(request.body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    model: ScriptedModel

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is the point of half the script; it is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait 40 ms for each other
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: tests and screens own the terminal."""

    def do_GET(self) -> None:
        self._send(200, json.dumps({"object": "list", "data": [{"id": "scripted", "object": "model"}]}).encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._answer(self.server.model.take(Request(self.path, headers, json.loads(raw))))

    def _answer(self, item: Fixed) -> None:
        if isinstance(item, Say):
            self._send(200, item.body())
        elif isinstance(item, Status):
            body = item.body if isinstance(item.body, str) else json.dumps(item.body)
            self._send(item.code, body.encode(), headers=item.headers)
        elif isinstance(item, Html):
            self._send(200, item.page.encode(), kind="text/html")
        elif isinstance(item, Empty):
            self._send(200, b"")
        elif isinstance(item, Truncate):
            body_bytes = item.item.body()
            self._send(200, body_bytes[:len(body_bytes) // 2])
        elif isinstance(item, Raw):
            self.close_connection = True
            item.act(self.connection, self.server.model.pause)
        elif isinstance(item, Delay):
            self.server.model.pause(item.seconds)
            later = item.item
            self._answer(later if isinstance(later, Fixed) else later({}))
        else:
            self._break_off(item)

    def _break_off(self, item: Disconnect | Stall | Drip) -> None:
        """Answers whose body never arrives whole, or far too late."""
        self.close_connection = True
        if item.item is None:
            return
        body = item.item.body()
        self._head(200, len(body))
        if isinstance(item, Drip):
            for position in range(len(body)):
                self.wfile.write(body[position:position + 1])
                self.wfile.flush()
                self.server.model.pause(item.pause)
            return
        self.wfile.write(body[:item.after])
        self.wfile.flush()
        if isinstance(item, Stall):
            self.server.model.pause(item.seconds)

    def _send(self, code: int, body: bytes, kind: str = "application/json",
              headers: Mapping[str, str] | None = None) -> None:
        self._head(code, len(body), kind, headers)
        self.wfile.write(body)

    def _head(self, code: int, length: int, kind: str = "application/json",
              headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
