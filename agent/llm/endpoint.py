"""One validated call to an OpenAI-compatible endpoint: retried, bounded in time, priced.

The openai client's own retries are off, since it sleeps as long as a server asks (90 s inside one call with a 3 s
timeout) and never retries a broken body. A call runs in a thread of its own with a client of its own (made in 16 ms,
measured), so that name look-up, a dripping header or a stalled body cannot outlast ``timeout_seconds``, and giving one
call up breaks no other. A body is read in pieces, and no further than ``LARGEST_BODY``.

What an endpoint does not know (a response format, a temperature, a name of the token limit) is left out once it says
so, and that is remembered for its later calls.
"""

from __future__ import annotations

import dataclasses
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import httpx2
import openai
import tenacity

from agent import config
from agent.llm import prices
from agent.llm.answers import (
    BadRequest,
    EndpointError,
    Garbage,
    Reply,
    Transient,
    Wish,
    read_reply,
    read_wish,
    refusal,
)
from agent.llm.quote import one_line
from agent.propose import add_costs
from agent.records import Cost

Message = dict[str, str]
Format = Literal["json_schema", "json_object", "plain"]

CHARACTERS_A_TOKEN = 3.5
"""Used only where a server reports no usage but a price is set."""
LONGEST_WAIT = 120.0
"""Seconds between two tries at most, whatever Retry-After says."""
LARGEST_BODY = 8 << 20
"""Bytes of an answer that are read: a patch is limited to far less, and an endless answer must not fill the memory."""


class Endpoint:
    """A model behind a base URL.

    ``complete`` raises the typed errors of answers.py. No exception text, and no message sent, contains a key.
    ``secrets``: keys of other endpoints, which this one must not see either. ``sleep``, ``clock`` and ``jitter`` are
    arguments for tests and for a caller that must wake early.
    """

    def __init__(self, model: config.Model, key: str, base_url: str, name: str, *, secrets: Sequence[str] = (),
                 sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
                 jitter: Callable[[], float] = random.random) -> None:
        self.base_url, self.name = base_url, name
        self.answered = False
        """Has any call succeeded yet?"""
        self.format: Format = "json_schema"
        self._format_works = False
        self._tokens_name: str | None = "max_tokens"
        self._temperature, self._stream = model.temperature, model.stream
        self._model, self._key = model, key
        self._secrets = tuple(sorted({one for one in (key, *secrets) if len(one) >= 8}, key=len, reverse=True))
        self._sleep, self.clock, self._jitter = sleep, clock, jitter
        self._trust: ssl.SSLContext | None = None
        self.patience = LONGEST_WAIT
        """Seconds that it waits between two tries; where more are asked for, the error is raised at once, for a caller
        that has somebody else to ask."""

    def complete(self, messages: Sequence[Message], schema: Mapping[str, Any], until: float | None = None) -> Reply:
        """The model's reply, asked for as JSON of ``schema`` as far as the endpoint can; as text where it is empty.

        Transient, RateLimited and Garbage are tried ``attempts`` times in all, and not beyond ``until`` (by the clock).
        The cost, of a reply or of an error, counts the failed calls as well.
        """
        started, spent = self.clock(), Cost()
        end = float("inf") if until is None else until

        def try_once() -> Reply:
            nonlocal spent
            try:
                reply = self._adapt(messages, schema, end)
            except EndpointError as error:
                spent = add_costs(spent, error.cost)
                raise
            spent = add_costs(spent, reply.cost)
            return reply

        tries = tenacity.Retrying(
            stop=lambda state: (state.attempt_number >= self._model.attempts or state.upcoming_sleep > self.patience
                                or self.clock() + state.upcoming_sleep >= end),
            wait=self._wait, sleep=self._sleep, reraise=True,
            retry=tenacity.retry_if_exception_type(Transient))
        try:
            reply = tries(try_once)
        except EndpointError as error:
            error.cost = add_costs(spent, Cost(seconds=self.clock() - started))
            raise
        self.answered = True
        return dataclasses.replace(reply, cost=add_costs(spent, Cost(seconds=self.clock() - started)))

    def _adapt(self, messages: Sequence[Message], schema: Mapping[str, Any], end: float) -> Reply:
        """One call; while the endpoint refuses a parameter that can be left out, again without it."""
        calls = 0
        while True:
            calls += 1
            try:
                reply = self._call(messages, schema, end)
                self._format_works = self._format_works or bool(schema)
                return dataclasses.replace(reply, cost=add_costs(reply.cost, Cost(calls=calls - 1)))
            except BadRequest as error:
                if not self._leave_out(error):
                    error.cost = Cost(calls=calls)
                    raise
            except EndpointError as error:
                tokens = error.tokens if isinstance(error, Garbage) else Cost()
                error.cost = add_costs(self.priced(tokens), Cost(calls=calls))
                raise

    def _leave_out(self, error: BadRequest) -> bool:
        """Drop what ``error`` names, for good. An unexplained 400 or 422 is blamed on a format that never worked."""
        if error.parameter == "temperature" and self._temperature is not None:
            self._temperature = None
        elif error.parameter == "stream" and self._stream:
            self._stream = False
        elif error.parameter == "max_tokens" and self._tokens_name:
            self._tokens_name = "max_completion_tokens" if self._tokens_name == "max_tokens" else None
        elif self.format != "plain" and (error.parameter == "response_format" or (
                not error.parameter and error.status in (400, 422) and not self._format_works)):
            self.format = "json_object" if self.format == "json_schema" else "plain"
            self._format_works = False
        else:
            return False
        return True

    def _call(self, messages: Sequence[Message], schema: Mapping[str, Any], end: float) -> Reply:
        """One HTTP exchange. Raises a typed error with the key scrubbed from its text."""
        limit = min(self._model.timeout_seconds, end - self.clock())
        if limit <= 0:
            raise Transient("no time was left for another call", kind="timeout")
        body, headers = self._exchange(self.request(messages, schema), limit)
        reply = read_reply(body, headers)
        cost = reply.cost
        if not cost.prompt_tokens and not cost.completion_tokens:
            sent = sum(len(message["content"]) for message in messages)
            cost = Cost(cost.usd, round(sent / CHARACTERS_A_TOKEN), round(len(reply.text) / CHARACTERS_A_TOKEN))
        return dataclasses.replace(reply, cost=add_costs(self.priced(cost), Cost(calls=1)))

    def look_up(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]],
                until: float | None = None) -> Wish:
        """One call with ``tools`` on offer, tried once: what the model wants to look up.

        Raises EndpointError; a BadRequest means that the endpoint has no tools, as far as one can tell.
        """
        request = self.request([], {}) | {"messages": [self._scrubbed(one) for one in messages], "tools": list(tools)}
        for key in ("stream", "stream_options"):
            request.pop(key, None)
        started = self.clock()
        limit = self._model.timeout_seconds if until is None else min(self._model.timeout_seconds, until - started)
        try:
            if limit <= 0:
                raise Transient("no time was left for a look-up", kind="timeout")
            body, headers = self._exchange(request, limit)
            wish = read_wish(body, headers)
        except EndpointError as error:
            tokens = error.tokens if isinstance(error, Garbage) else Cost()
            error.cost = add_costs(self.priced(tokens), Cost(calls=1, seconds=self.clock() - started))
            raise
        self.answered = True
        cost = add_costs(self.priced(wish.cost), Cost(calls=1, seconds=self.clock() - started))
        return dataclasses.replace(wish, cost=cost)

    def listed(self, limit: float) -> list[Mapping[str, Any]]:
        """What the endpoint lists under /models; empty where it lists nothing. Raises the typed errors."""
        try:
            with self._connect(limit) as client:
                found = client.get("/models", cast_to=object)
        except (openai.OpenAIError, httpx2.HTTPError, ValueError, Garbage) as failure:
            raise self._typed(failure, limit) from None
        entries = found.get("data") if isinstance(found, dict) else None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    def _exchange(self, request: dict[str, Any], limit: float) -> tuple[str, Mapping[str, str]]:
        """Body, without any key, and headers of a 200."""
        exchange = _Exchange(self._connect(limit), request)
        exchange.start()
        exchange.join(limit)
        if exchange.is_alive():
            exchange.given_up.set()
            raise Transient(f"no whole answer within {limit:g} s", kind="stalled" if exchange.begun else "timeout")
        if exchange.failure is not None:
            raise self._typed(exchange.failure, limit) from None
        if exchange.answer is None:
            raise RuntimeError("the thread of a model call ended without an answer; its traceback is above")
        body, headers = exchange.answer
        return self._scrub(body), headers

    def request(self, messages: Sequence[Message], schema: Mapping[str, Any] | None) -> dict[str, Any]:
        """The body of a call, as it would be sent now. ``schema`` None: as plain text."""
        request: dict[str, Any] = {
            "model": self.name,
            "messages": [{**message, "content": self._scrub(message["content"])} for message in messages],
        }
        if self._tokens_name:
            request[self._tokens_name] = self._model.max_tokens
        if self._temperature is not None:
            request["temperature"] = self._temperature
        if self._stream:
            request |= {"stream": True, "stream_options": {"include_usage": True}}
        if schema and self.format == "json_schema":
            described = {"name": "proposal", "strict": True, "schema": dict(schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": described}
        elif schema and self.format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _typed(self, failure: Exception, limit: float) -> EndpointError:
        if isinstance(failure, Garbage):
            return failure
        if isinstance(failure, openai.APIStatusError):
            response = failure.response
            return refusal(response.status_code, self._scrub(response.text[:LARGEST_BODY]), response.headers)
        if isinstance(failure, (openai.APITimeoutError, httpx2.TimeoutException)):
            return Transient(f"no answer within {limit:g} s", kind="timeout")
        causes: list[BaseException] = [failure]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 10:
            causes.append(cause)
        told = one_line(self._scrub(str(failure.__cause__ or failure)), 160)
        secured = any(isinstance(cause, ssl.SSLError) for cause in causes) or "SSL" in told
        return Transient(f"no connection: {told}", kind="tls" if secured else "no connection")

    def _wait(self, tries: tenacity.RetryCallState) -> float:
        """Seconds before the next try: what the server asked for, else 1, 2, 4, ... with up to as much jitter."""
        error = tries.outcome.exception() if tries.outcome else None
        asked = error.retry_after if isinstance(error, Transient) else None
        if asked is not None:
            return min(LONGEST_WAIT, asked * (1 + 0.1 * self._jitter()) + 0.05)
        step = min(LONGEST_WAIT / 2, 2.0 ** (tries.attempt_number - 1))
        return step * (1 + self._jitter())

    def priced(self, cost: Cost) -> Cost:
        """``cost`` with USD by the config's prices, unless the server gave its own."""
        if cost.usd:
            return cost
        usd = prices.find(self._model, self.name, self.base_url).usd(cost.prompt_tokens, cost.completion_tokens)
        return add_costs(cost, Cost(usd=usd))

    def _scrub(self, text: str) -> str:
        """``text`` without any key: some endpoints echo it, and source may hold it. A short dummy is no secret."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    def _scrubbed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        return {**message, "content": self._scrub(content) if isinstance(content, str) else content}

    def _connect(self, limit: float) -> openai.OpenAI:
        if self._trust is None:  # read once: the list of authorities takes 20 ms
            self._trust = httpx2.create_ssl_context()
        client = openai.DefaultHttpxClient(event_hooks={"response": [_cap]}, base_url=self.base_url, timeout=limit,
                                           verify=self._trust)
        return openai.OpenAI(api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=limit,
                             http_client=client)


class _Capped(httpx2.SyncByteStream):
    """A body that ends with Garbage after ``LARGEST_BODY`` bytes as sent: that of an error too, which the openai client
    reads to its end by itself."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > LARGEST_BODY:
                raise too_large()
            yield piece

    def close(self) -> None:
        self._stream.close()


def _cap(response: httpx2.Response) -> None:
    if isinstance(response.stream, httpx2.SyncByteStream):
        response.stream = _Capped(response.stream)


def too_large() -> Garbage:
    """The error of a body longer than ``LARGEST_BODY``."""
    return Garbage(f"the answer was longer than {LARGEST_BODY >> 20} MiB", kind="too large")


class _Exchange(threading.Thread):
    """Sends one request and keeps its raw answer. Daemon: an abandoned one never holds up the exit."""

    def __init__(self, client: openai.OpenAI, request: dict[str, Any]) -> None:
        super().__init__(daemon=True, name="model-call")
        self._client, self._request = client, request
        self.begun = False
        """Has anything of the answer come?"""
        self.given_up = threading.Event()
        self.answer: tuple[str, Mapping[str, str]] | None = None
        self.failure: openai.OpenAIError | httpx2.HTTPError | ValueError | Garbage | None = None

    def run(self) -> None:
        create = self._client.chat.completions.with_streaming_response.create
        body = bytearray()
        try:
            with self._client, create(**self._request) as raw:
                self.begun = True
                for piece in raw.iter_bytes():
                    body += piece
                    if self.given_up.is_set():
                        return
                    if len(body) > LARGEST_BODY:
                        raise too_large()
                self.answer = body.decode("utf-8", "replace"), raw.headers
        except (openai.OpenAIError, httpx2.HTTPError, ValueError, Garbage) as failure:  # a body's come unwrapped
            self.failure = failure
