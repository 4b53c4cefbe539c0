"""One validated call to an OpenAI-compatible endpoint: retried, bounded in time, priced.

The openai client's own retries are off, since it sleeps as long as a server asks (90 s inside one call with a 3 s
timeout) and never retries a broken body. A call runs in a thread of its own, so that name look-up, a dripping header
or a stalled body cannot outlast ``timeout_seconds``. What an endpoint does not know (a response format, a
temperature, a name of the token limit) is left out once it says so, and that is remembered for its later calls.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import openai
import tenacity

from agent import config
from agent.answers import (
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
from agent.propose import add_costs
from agent.quote import one_line
from agent.records import Cost

Message = dict[str, str]
Format = Literal["json_schema", "json_object", "plain"]

CHARACTERS_A_TOKEN = 3.5
"""Used only where a server reports no usage but a price is set."""
LONGEST_WAIT = 120.0
"""Seconds between two tries at most, whatever Retry-After says."""


class Endpoint:
    """A model behind a base URL.

    ``complete`` raises the typed errors of agent/answers.py. No exception text, and no message sent, contains the key.
    ``sleep``, ``clock`` and ``jitter`` are arguments for tests and for a caller that must wake early.
    """

    def __init__(self, model: config.Model, key: str, base_url: str, name: str, *,
                 sleep: Callable[[float], None] = time.sleep, clock: Callable[[], float] = time.monotonic,
                 jitter: Callable[[], float] = random.random) -> None:
        self.base_url, self.name = base_url, name
        self.answered = False
        """Has any call succeeded yet?"""
        self.format: Format = "json_schema"
        self._format_works = False
        self._tokens_name: str | None = "max_tokens"
        self._temperature = model.temperature
        self._model, self._key = model, key
        self._sleep, self._clock, self._jitter = sleep, clock, jitter
        self._client = self._connect()

    def complete(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        """The model's reply, asked for as JSON of ``schema`` as far as the endpoint can.

        Transient, RateLimited and Garbage are tried ``attempts`` times in all. The cost, of a reply or of an error,
        counts the failed calls as well.
        """
        started, spent = self._clock(), Cost()

        def try_once() -> Reply:
            nonlocal spent
            try:
                reply = self._adapt(messages, schema)
            except EndpointError as error:
                spent = add_costs(spent, error.cost)
                raise
            spent = add_costs(spent, reply.cost)
            return reply

        tries = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._model.attempts), wait=self._wait, sleep=self._sleep, reraise=True,
            retry=tenacity.retry_if_exception_type(Transient))
        try:
            reply = tries(try_once)
        except EndpointError as error:
            error.cost = add_costs(spent, Cost(seconds=self._clock() - started))
            raise
        self.answered = True
        return Reply(reply.text, add_costs(spent, Cost(seconds=self._clock() - started)), reply.cut)

    def close(self) -> None:
        self._client.close()

    def _adapt(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        """One call; while the endpoint refuses a parameter that can be left out, again without it."""
        calls = 0
        while True:
            calls += 1
            try:
                reply = self._call(messages, schema)
                self._format_works = True
                return Reply(reply.text, add_costs(reply.cost, Cost(calls=calls - 1)), reply.cut)
            except BadRequest as error:
                if not self._leave_out(error):
                    error.cost = Cost(calls=calls)
                    raise
            except EndpointError as error:
                tokens = error.tokens if isinstance(error, Garbage) else Cost()
                error.cost = add_costs(self._priced(tokens), Cost(calls=calls))
                raise

    def _leave_out(self, error: BadRequest) -> bool:
        """Drop what ``error`` names, for good. An unexplained 400 or 422 is blamed on a format that never worked."""
        if error.parameter == "temperature" and self._temperature is not None:
            self._temperature = None
        elif error.parameter == "max_tokens" and self._tokens_name:
            self._tokens_name = "max_completion_tokens" if self._tokens_name == "max_tokens" else None
        elif self.format != "plain" and (error.parameter == "response_format" or (
                not error.parameter and error.status in (400, 422) and not self._format_works)):
            self.format = "json_object" if self.format == "json_schema" else "plain"
            self._format_works = False
        else:
            return False
        return True

    def _call(self, messages: Sequence[Message], schema: Mapping[str, Any]) -> Reply:
        """One HTTP exchange. Raises a typed error with the key scrubbed from its text."""
        body, headers = self._send(self.request(messages, schema))
        reply = read_reply(body, headers)
        cost = reply.cost
        if not cost.prompt_tokens and not cost.completion_tokens:
            sent = sum(len(message["content"]) for message in messages)
            cost = Cost(cost.usd, round(sent / CHARACTERS_A_TOKEN), round(len(reply.text) / CHARACTERS_A_TOKEN))
        return Reply(reply.text, add_costs(self._priced(cost), Cost(calls=1)), reply.cut)

    def look_up(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> Wish:
        """One call with ``tools`` on offer, tried once: what the model wants to look up.

        Raises EndpointError; a BadRequest means that the endpoint has no tools, as far as one can tell.
        """
        request = self.request([], None) | {"messages": [self._scrubbed(one) for one in messages], "tools": list(tools)}
        started = self._clock()
        try:
            body, headers = self._send(request)
            wish = read_wish(body, headers)
        except EndpointError as error:
            tokens = error.tokens if isinstance(error, Garbage) else Cost()
            error.cost = add_costs(self._priced(tokens), Cost(calls=1, seconds=self._clock() - started))
            raise
        self.answered = True
        cost = add_costs(self._priced(wish.cost), Cost(calls=1, seconds=self._clock() - started))
        return dataclasses.replace(wish, cost=cost)

    def _send(self, request: dict[str, Any]) -> tuple[str, Mapping[str, str]]:
        """(scrubbed body, headers) of one HTTP exchange. Raises a typed error."""
        exchange = _Exchange(self._client, request)
        exchange.start()
        exchange.join(self._model.timeout_seconds)
        if exchange.is_alive():
            self._client.close()
            self._client = self._connect()
            raise Transient(f"no whole answer within {self._model.timeout_seconds:g} s")
        if exchange.failure is not None:
            raise self._typed(exchange.failure) from None
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
        if schema is None:
            return request
        if self.format == "json_schema":
            described = {"name": "proposal", "strict": True, "schema": dict(schema)}
            request["response_format"] = {"type": "json_schema", "json_schema": described}
        elif self.format == "json_object":
            request["response_format"] = {"type": "json_object"}
        return request

    def _typed(self, failure: openai.OpenAIError | ValueError) -> EndpointError:
        if isinstance(failure, openai.APIStatusError):
            response = failure.response
            return refusal(response.status_code, self._scrub(response.text), response.headers)
        if isinstance(failure, openai.APITimeoutError):
            return Transient(f"no answer within {self._model.timeout_seconds:g} s")
        cause = failure.__cause__ or failure
        return Transient(f"no connection: {one_line(self._scrub(str(cause)), 160)}")

    def _wait(self, tries: tenacity.RetryCallState) -> float:
        """Seconds before the next try: what the server asked for, else 1, 2, 4, ... with up to as much jitter."""
        error = tries.outcome.exception() if tries.outcome else None
        asked = error.retry_after if isinstance(error, Transient) else None
        if asked is not None:
            return min(LONGEST_WAIT, asked * (1 + 0.1 * self._jitter()) + 0.05)
        step = min(LONGEST_WAIT / 2, 2.0 ** (tries.attempt_number - 1))
        return step * (1 + self._jitter())

    def _priced(self, cost: Cost) -> Cost:
        """``cost`` with USD by the config's prices, unless the server gave its own."""
        if cost.usd:
            return cost
        usd = (cost.prompt_tokens * self._model.usd_per_million_prompt
               + cost.completion_tokens * self._model.usd_per_million_completion) / 1e6
        return add_costs(cost, Cost(usd=usd))

    def _scrub(self, text: str) -> str:
        """``text`` without the key: some endpoints echo it, and source may hold it. A short dummy is no secret."""
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text

    def _scrubbed(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        return {**message, "content": self._scrub(content) if isinstance(content, str) else content}

    def _connect(self) -> openai.OpenAI:
        return openai.OpenAI(
            api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=self._model.timeout_seconds)


class _Exchange(threading.Thread):
    """Sends one request and keeps its raw answer. Daemon: an abandoned one never holds up the exit."""

    def __init__(self, client: openai.OpenAI, request: dict[str, Any]) -> None:
        super().__init__(daemon=True, name="model-call")
        self._client, self._request = client, request
        self.answer: tuple[str, Mapping[str, str]] | None = None
        self.failure: openai.OpenAIError | ValueError | None = None

    def run(self) -> None:
        try:
            raw = self._client.chat.completions.with_raw_response.create(**self._request)
            self.answer = raw.http_response.content.decode("utf-8", "replace"), raw.headers
        except (openai.OpenAIError, ValueError) as failure:
            self.failure = failure
