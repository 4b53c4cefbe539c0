"""Predictions: what a model says of its proposal beforehand, read from its reply and scored against what came of it.

The score goes back to the model, so that it can see whether its ranges are too narrow and its hopes too high. A
prediction decides nothing. Effects are candidate minus incumbent on the val split, as a briefing shows them.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent import power
from agent.llm.quote import one_line, plain
from agent.records import Prediction

FIELDS: dict[str, dict[str, Any]] = {
    "expected_low": {"type": ["number", "null"]},
    "expected_high": {"type": ["number", "null"]},
    "step_cost": {"type": ["number", "null"]},
    "check": {"type": "string"},
    "different": {"type": "string"},
}
"""Keys of a JSON reply that make a Prediction, with their schema."""
RECENT = 40
"""Predictions that a score is made of, the newest."""
LEAST = 3
"""Predictions below which there is no score."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A prediction and what came of it."""

    prediction: Prediction
    expected: float | None
    effect: float | None
    """None: never trained."""
    step_cost: float | None
    """As the tiny run measured it; None: not measured."""


@dataclass(frozen=True, slots=True)
class Score:
    """How good a model's recent predictions were."""

    ranges: int
    inside: int
    """Ranges that the effect fell into."""
    effects: int
    expected: float
    seen: float
    """Means over the ``effects`` predictions that gave a number and were measured."""
    order: float | None
    """Spearman's correlation of the expected with the seen; None where there is none."""
    costs: int
    cost_error: float
    """Mean of |log2(expected / measured)| of the step cost over ``costs`` predictions."""


def read(text: str) -> Prediction:
    """The prediction in a model's reply: keys of its JSON, or lines such as ``Check: ...``; empty without one."""
    value = _object(text)
    if value is None:
        value = {name: found[1].strip() for name in FIELDS
                 if (found := re.search(rf"^[\s*#-]*{name.replace('_', '[ _]')}[\s*]*:[\s*]*(.+)$", text,
                                        re.IGNORECASE | re.MULTILINE))}
    low, high = _number(value.get("expected_low")), _number(value.get("expected_high"))
    if low is None or high is None:
        low = high = None
    elif low > high:
        low, high = high, low
    cost = _number(value.get("step_cost"))
    return Prediction(low, high, cost if cost is not None and cost > 0 else None,
                      _words(value.get("check")), _words(value.get("different")))


def score(outcomes: Sequence[Outcome]) -> Score | None:
    """The score of the newest RECENT; None below LEAST that can be scored at all."""
    recent = outcomes[-RECENT:]
    ranged = [(one.prediction.low, one.effect, one.prediction.high) for one in recent]
    known = [(low, effect, high) for low, effect, high in ranged
             if low is not None and high is not None and effect is not None]
    pairs = [(one.expected, one.effect) for one in recent if one.expected is not None and one.effect is not None]
    costs = [abs(math.log2(one.prediction.step_cost / one.step_cost)) for one in recent
             if one.prediction.step_cost and one.step_cost]
    if max(len(known), len(pairs)) < LEAST:
        return None
    order = power.order([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) >= LEAST else None
    return Score(
        ranges=len(known), inside=sum(low <= effect <= high for low, effect, high in known), effects=len(pairs),
        expected=statistics.fmean(a for a, _ in pairs) if pairs else 0.0,
        seen=statistics.fmean(b for _, b in pairs) if pairs else 0.0, order=order.rho if order else None,
        costs=len(costs), cost_error=statistics.fmean(costs) if costs else 0.0)


def told(found: Score | None) -> str:
    """The score in words for a briefing; empty without one."""
    if found is None:
        return ""
    parts = []
    if found.ranges:
        parts.append(f"{found.inside} of your last {found.ranges} ranges held the effect that was seen")
    if found.effects:
        parts.append(f"you expected {found.expected:+.3f} on average, {found.seen:+.3f} was seen ({found.effects} "
                     "attempts)")
    if found.order is not None:
        parts.append(f"rank correlation of the two {found.order:+.2f}")
    if found.costs:
        parts.append(f"your step costs were off by a factor of {2 ** found.cost_error:.2f} on average")
    return "; ".join(parts)


def _object(text: str) -> dict[str, Any] | None:
    """The first JSON object in ``text`` that has one of the keys."""
    decoder = json.JSONDecoder(strict=False)
    for match in list(re.finditer(r"\{\s*\"", text))[:20]:
        try:
            value, _ = decoder.raw_decode(text[match.start():])
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and FIELDS.keys() & value.keys():
            return value
    return None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _words(value: Any) -> str:
    return one_line(plain(value), 400) if isinstance(value, str) else ""
