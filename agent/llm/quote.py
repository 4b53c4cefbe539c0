"""Makes untrusted text safe to show: to a model inside a prompt, and to a person on a terminal.

What a training run printed, what a model wrote as a title, and what an endpoint sent as an error are all untrusted.
Each is stripped of control bytes, capped, and either squeezed to one line or put in a fence that it cannot close.
This does not make the text true, and a model may still believe it: nothing that a model answers is ever executed
outside the box or merged without a measurement.
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_DECIMALS = re.compile(r"(?<![\w.])([-+]?\d+\.\d{4,})(?![\w.])")


def plain(text: str) -> str:
    """``text`` without terminal sequences, control characters, direction marks and lone surrogates."""
    return _CONTROL.sub("", _ANSI.sub("", text.replace("\r\n", "\n")))


def one_line(text: str, cap: int) -> str:
    """``text`` as one line of at most ``cap`` characters; ``...`` ends a line that was cut."""
    line = " ".join(plain(text.replace("\r", "\n")).split())
    return line if len(line) <= cap else line[:cap - 3].rstrip() + "..."


def rounded(text: str) -> str:
    """``text`` with every number of four or more decimals rounded to three.

    Held-out scores reach the model to three decimals only, so that it cannot climb on their noise.
    """
    return _DECIMALS.sub(lambda found: f"{float(found[1]):.3f}", text)


def fence(text: str, info: str = "") -> str:
    """``text`` unchanged in a fence of backticks longer than any run inside it, so that it cannot close it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{info}\n{text.rstrip(chr(10))}\n{ticks}"


def quoted(text: str, cap: int = 3000) -> str:
    """Untrusted output in a fence: plain, at most its last ``cap`` characters, chat-template marks broken up."""
    body = plain(text.replace("\r", "\n")).replace("<|", "< |").replace("|>", "| >")
    if len(body) > cap:
        body = f"[{len(body) - cap} characters left out]\n" + body[-cap:]
    return fence(body, "text")


def shown_url(url: str) -> str:
    """``url`` without user, password and query: fit for a message."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
