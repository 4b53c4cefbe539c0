"""A weighing design under way: which rows are out, which failed, and what they said in the end."""

from __future__ import annotations

from collections.abc import Sequence

from agent.gate import design
from agent.gate.words import Outcome

TRIES = 2
"""Starts of a row whose run fails."""


class Batch:
    """Rows are built on the tip where the design began, whatever is merged meanwhile. Each has a seed of its own."""

    def __init__(self, names: Sequence[str], on: design.Matrix, seeds: Sequence[int], tip: int) -> None:
        self.names, self.seeds, self.tip = tuple(names), tuple(seeds), tip
        self.todo = list(range(len(seeds)))
        self._on = on
        self._tries = [0] * len(seeds)
        self._found: dict[int, Outcome] = {}

    @property
    def done(self) -> bool:
        return len(self._found) == len(self.seeds)

    def arm(self, row: int) -> tuple[str, ...]:
        """Candidates that are on."""
        return tuple(name for name, sign in zip(self.names, self._on[row], strict=True) if sign > 0)

    def ran(self, seed: int, outcome: Outcome) -> None:
        """A row came back; one that failed is run once more."""
        row = self.seeds.index(seed)
        self._tries[row] += 1
        if outcome.fault and self._tries[row] < TRIES:
            self.todo.append(row)
        else:
            self._found[row] = outcome

    def guilty(self) -> dict[str, str]:
        """Candidates that are on in all failed rows and off in all good ones, with a fault of theirs."""
        failed = [bool(self._found[row].fault) for row in range(len(self.seeds))]
        fault = next((outcome.fault for _, outcome in sorted(self._found.items()) if outcome.fault), "")
        return {self.names[column]: fault for column in design.blamed(self._on, failed)}

    def solve(self, names: Sequence[str]) -> design.Weighed | None:
        """What the good rows say of these candidates, all others being off in them."""
        good = [row for row in range(len(self.seeds)) if not self._found[row].fault]
        columns = [self.names.index(name) for name in names]
        return design.solve(self._on[good][:, columns], [self._found[row].loss for row in good]) if columns else None
