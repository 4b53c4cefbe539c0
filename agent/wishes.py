"""Wishes: what the owner said while the campaign ran, as the briefings show it."""

from __future__ import annotations

from agent.ledger import State

WISHES = 5
"""The newest ones that a briefing shows."""


def wishes(state: State) -> tuple[str, ...]:
    """The owner's words that hold now, oldest first."""
    kept: list[str] = []
    for order in state.orders:
        if order.kind == "forget":
            kept.clear()
        elif order.kind == "steer" and not order.refused:
            kept.append(order.text)
    return tuple(kept[-WISHES:])
