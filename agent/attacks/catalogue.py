"""All attacks, family by family."""

from __future__ import annotations

from agent.attacks import (
    causality,
    charge,
    damage,
    foreign,
    form,
    handover,
    limits,
    metric,
    network,
    persistence,
    processes,
    server,
    speech,
    theft,
    waiting,
)
from agent.attacks.record import Attack

ATTACKS: tuple[Attack, ...] = tuple(attack for family in (
    metric, theft, processes, limits, network, damage, form, foreign, handover, persistence, causality, server, charge,
    speech, waiting) for attack in family.ATTACKS)
