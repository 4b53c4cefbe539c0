"""What an OpenAI-compatible endpoint said -> a Reply, or one of seven typed errors. Pure: no socket, no clock.

Each error also names its ``kind`` in a few words (``KINDS``), which is what a person reads in the ledger.

The openai client (3.54, measured) hands back an HTML page as a ``str``, an error in a 200 as ``choices=None``, and a
cut body as a raw JSONDecodeError. So the body is taken raw and read here, where each odd answer has a test.
"""

from __future__ import annotations

import email.utils
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.llm.quote import one_line
from agent.records import Cost

KINDS = ("rate limit", "overloaded", "server error", "no connection", "tls", "timeout", "stalled", "web page", "empty",
         "broken JSON", "no choices", "no content", "refusal", "cut off", "too large", "quota", "key refused",
         "context overflow", "unknown model", "bad request", "no patch")
"""What can become of a question. The last one is a reply without a usable patch, which is no endpoint's fault."""


class EndpointError(Exception):
    """One call gave no reply. ``cost`` is what the failed calls cost together."""

    cost: Cost = Cost()
    kind: str = "server error"


class Transient(EndpointError):
    """Down, overloaded, cut off or late: another try may work. ``retry_after``: seconds, if the server said."""

    def __init__(self, message: str, retry_after: float | None = None, kind: str = "server error") -> None:
        super().__init__(message)
        self.retry_after, self.kind = retry_after, kind


class RateLimited(Transient):
    """429: too many requests for now."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message, retry_after, "rate limit")


class Garbage(Transient):
    """A 200 without a usable reply: HTML, empty, cut JSON, no choices, no content. ``tokens`` were still charged."""

    def __init__(self, message: str, tokens: Cost | None = None, kind: str = "broken JSON") -> None:
        super().__init__(message, None, kind)
        self.tokens = tokens or Cost()


class Quota(EndpointError):
    """The account is out of money: no retry can mend it."""

    kind = "quota"


class Auth(EndpointError):
    """The key was refused (401, 403)."""

    kind = "key refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ContextOverflow(EndpointError):
    """The prompt is longer than the model's context."""

    kind = "context overflow"


class BadRequest(EndpointError):
    """The request itself was refused. ``status`` 404: no such model or path. ``parameter``: the one it names."""

    def __init__(self, message: str, status: int, parameter: str = "") -> None:
        super().__init__(message)
        self.status, self.parameter = status, parameter
        self.kind = "unknown model" if status == 404 else "bad request"


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said. ``cut`` when it hit the token limit before it was done."""

    text: str
    cost: Cost
    cut: bool = False
    model: str = ""
    """The name that the server gave of what answered."""


@dataclass(frozen=True, slots=True)
class Call:
    """One tool that the model wants used. ``arguments`` is as it wrote them; empty where they are no JSON object."""

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What a model with tools said: calls, or text alone when it has seen enough."""

    text: str
    calls: tuple[Call, ...]
    cost: Cost


_CONTEXT = re.compile(
    r"context[ _](?:length|window|size)|maximum context|prompt is too long|too many (?:input |prompt )?tokens|"
    r"exceed\w* (?:the )?(?:available |model'?s )?context|reduce the length of", re.IGNORECASE)
_QUOTA = re.compile(
    r"insufficient[_ ](?:quota|balance|credit|funds)|exceeded your current quota|billing", re.IGNORECASE)
_PARAMETERS = (
    ("response_format", re.compile(
        r"response_format|json_schema|json_object|structured output|grammar", re.IGNORECASE)),
    ("max_tokens", re.compile(r"max_tokens|max_completion_tokens", re.IGNORECASE)),
    ("temperature", re.compile(r"temperature", re.IGNORECASE)),
    ("stream", re.compile(r"stream_options|\bstream(?:ing)? (?:is )?not supported", re.IGNORECASE)),
)


def refusal(status: int, body: str, headers: Mapping[str, str]) -> EndpointError:
    """The typed error of an HTTP error status, or of a 200 whose body is ``{"error": ...}`` with that code."""
    message, code, param = _error_fields(body)
    said = f"{status}: {one_line(message, 200)}" if message else str(status)
    wait = retry_after(headers)
    if status == 402 or code == "insufficient_quota" or (status in (403, 429) and _QUOTA.search(message)):
        return Quota(said)
    if status in (401, 403):
        return Auth(said, status)
    if status == 413 or code == "context_length_exceeded" or (400 <= status < 500 and _CONTEXT.search(message)):
        return ContextOverflow(said)
    if status == 429:
        return RateLimited(said, wait)
    if status in (408, 409, 425) or status >= 500 or status < 400:
        return Transient(said, wait, "overloaded" if status in (503, 529) else "server error")
    return BadRequest(said, status, _named_parameter(param, message))


def read_reply(body: str, headers: Mapping[str, str]) -> Reply:
    """The reply in a 200's body; its cost holds the tokens and the server's own ``usage.cost``.

    Raises Garbage when there is none in it, or the typed error that the body carries.
    """
    choice, cost, model = _choice(body, headers)
    return replace(_content(choice, cost), model=model)


def read_wish(body: str, headers: Mapping[str, str]) -> Wish:
    """The same of a call that offered tools: a message without content is no error if it has calls."""
    choice, cost, _ = _choice(body, headers)
    message = choice.get("message")
    asked = message.get("tool_calls") if isinstance(message, dict) else None
    calls = tuple(call for one in (asked if isinstance(asked, list) else []) if (call := _call(one)) is not None)
    if calls:
        content = message.get("content") if isinstance(message, dict) else None
        return Wish(content if isinstance(content, str) else "", calls, cost)
    return Wish(_content(choice, cost).text, (), cost)


def _choice(body: str, headers: Mapping[str, str]) -> tuple[dict[str, Any], Cost, str]:
    """The first choice of a 200's body, its cost, and the name that the server gave of the model."""
    kind = headers.get("content-type", "?").split(";")[0]
    if not body.strip():
        raise Garbage("the answer was empty", kind="empty")
    if kind == "text/event-stream":
        return _read_stream(body, headers)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        shown = one_line(body, 60)
        page = body.lstrip()[:1] == "<"
        raise Garbage(f"the answer was {'a web page' if page else 'broken JSON'} ({kind}): {shown}",
                      kind="web page" if page else "broken JSON") from None
    return _read_answer(answer, body, headers)


def _read_stream(body: str, headers: Mapping[str, str]) -> tuple[dict[str, Any], Cost, str]:
    """The same of a whole event stream: its pieces of text joined. One that ends early is Garbage: a cut patch may
    still look like one."""
    events = [line[5:].strip() for line in body.splitlines() if line.startswith("data:")]
    text, finish, model = "", None, ""
    usage: Any = None
    refused = ""
    for event in events:
        if event == "[DONE]":
            break
        try:
            piece = json.loads(event)
        except (ValueError, RecursionError):
            raise Garbage(f"the stream held broken JSON: {one_line(event, 60)}") from None
        if not isinstance(piece, dict):
            raise Garbage("the stream held JSON, but no object")
        if piece.get("error"):
            raise refusal(_error_status(piece["error"]), event, headers)
        usage, model = piece.get("usage") or usage, str(piece.get("model") or model)
        choices = piece.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        given = choice.get("delta")
        delta = given if isinstance(given, dict) else {}
        text += str(delta.get("content") or "")
        refused += str(delta.get("refusal") or "")
        finish = choice.get("finish_reason") or finish
    if finish is None:
        raise Garbage("the stream ended before the answer did", _usage(usage), "cut off")
    message = {"content": text, "refusal": refused}
    return _read_answer({"choices": [{"message": message, "finish_reason": finish}], "usage": usage, "model": model},
                        body, headers)


def _read_answer(answer: Any, body: str, headers: Mapping[str, str]) -> tuple[dict[str, Any], Cost, str]:
    if not isinstance(answer, dict):
        raise Garbage("the answer was JSON, but no object")
    if answer.get("error"):
        raise refusal(_error_status(answer["error"]), body, headers)
    cost = _usage(answer.get("usage"))
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise Garbage("the answer had no choices", cost, "no choices")
    if choice.get("error"):
        raise refusal(_error_status(choice["error"]), json.dumps(choice), headers)
    return choice, cost, str(answer.get("model") or "")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``retry-after-ms`` or ``retry-after`` (seconds, or an HTTP date measured from ``date``), or None."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        due = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        now = email.utils.parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (due - now).total_seconds())
    except (TypeError, ValueError):
        return None


def _content(choice: dict[str, Any], cost: Cost) -> Reply:
    """The text of one choice; a list of parts is joined."""
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    cut = choice.get("finish_reason") == "length"
    if isinstance(content, str) and content.strip():
        return Reply(content, cost, cut)
    if cut:
        raise Garbage("the model used up its tokens before it answered; raise model.max_tokens", cost, "cut off")
    if message.get("refusal"):
        raise Garbage(f"the model declined: {one_line(str(message['refusal']), 160)}", cost, "refusal")
    if choice.get("finish_reason") == "content_filter":
        raise Garbage("the endpoint's filter kept the answer back", cost, "refusal")
    raise Garbage("the answer had no content", cost, "no content")


def _call(value: Any) -> Call | None:
    """One entry of ``tool_calls``; None where it names no function."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    raw = function.get("arguments")
    try:
        arguments = json.loads(raw) if isinstance(raw, str) else raw
    except ValueError:
        arguments = None
    return Call(str(value.get("id") or ""), function["name"], arguments if isinstance(arguments, dict) else {},
                raw if isinstance(raw, str) else json.dumps(raw))


def _usage(usage: Any) -> Cost:
    """Tokens and, where the server gives it, USD. Whatever is missing or no number counts as 0."""
    usage = usage if isinstance(usage, dict) else {}

    def number(name: str) -> float:
        value = usage.get(name)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        return float(value) if usable else 0.0

    return Cost(number("cost"), int(number("prompt_tokens")), int(number("completion_tokens")))


def _error_fields(body: str) -> tuple[str, str, str]:
    """(message, code, parameter) of an error body in any of the usual shapes; plain text is the message."""
    try:
        answer = json.loads(body)
    except ValueError:
        return ("" if body.lstrip()[:1] == "<" else body), "", ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if not isinstance(error, dict):
        return str(error), "", ""
    message = error.get("message") or error.get("detail") or error
    code = error.get("code") or error.get("type") or ""
    return (message if isinstance(message, str) else json.dumps(message)), str(code), str(error.get("param") or "")


def _error_status(error: Any) -> int:
    """The HTTP status that an error inside a 200 stands for; 500 where it does not say."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return 400 if _CONTEXT.search(json.dumps(error)) else 500


def _named_parameter(param: str, message: str) -> str:
    """Which of our optional parameters a refusal names, or an empty string."""
    for text in (param, message):
        for name, pattern in _PARAMETERS:
            if text and pattern.search(text):
                return name
    return ""
