"""The table of attacks as docs/SECURITY.md shows it. A test compares the two, so that neither grows alone."""

from __future__ import annotations

from collections.abc import Iterator

from agent.attacks.record import Attack
from agent.attacks.suite import ALL, families

LEVELS = (3, 2, 1, 0)


def markdown() -> str:
    """One table a family: what an attack does, what stands against it, and how it ends at each level."""
    return "\n".join(_family(name) for name in families())


def _family(name: str) -> str:
    attacks = [attack for attack in ALL if attack.family == name]
    head = ["| attack | does | defence | " + " | ".join(f"level {level}" for level in LEVELS) + " |",
            "|---|---|---|" + "---|" * len(LEVELS)]
    return "\n".join([f"### {name}", *head, *map(_row, attacks), *_reasons(attacks), ""])


def _row(attack: Attack) -> str:
    star = " ★" if attack.starred else ""
    ends = ["**not covered**" if level in attack.uncovered else " or ".join(attack.outcome) for level in LEVELS]
    return f"| {attack.name}{star} | {attack.does} | {attack.defence} | {' | '.join(ends)} |"


def _reasons(attacks: list[Attack]) -> Iterator[str]:
    """Why what is not covered is not."""
    why: dict[tuple[int, str], list[str]] = {}
    for attack in attacks:
        for level, reason in attack.uncovered.items():
            why.setdefault((level, reason), []).append(attack.name)
    if why:
        yield ""
    for (level, reason), names in why.items():
        yield f"- Level {level}, {', '.join(names)}: {reason}."
