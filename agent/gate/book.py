"""The gate's book: its candidates, the incumbent's runs at each tip, and how much runs and patches spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from agent import evidence
from agent.gate.beliefs import Belief, Candidate, Incumbent, Pairing, Place
from agent.gate.words import Gear, Settings

DEPLETION = 0.9
"""Share of the sum of its patches' expected gains that a bundle is expected to show."""
CAUTION = 0.7
"""Share of the expected gain on which the number of pairs is planned."""


class Book:
    """What is known, and what is believed of it. Decides nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.gear: Gear | None = None if settings.gear == "auto" else settings.gear
        self.tip = 0
        self.floor = settings.floor
        self.candidates: dict[str, Candidate] = {}
        self.incumbents = {0: Incumbent()}
        self.pairing: Pairing | None = None
        """Spread of candidates against the incumbent on equal seeds; None before the calibration."""
        self.apart: Pairing | None = None
        """Spread of the same runs by themselves."""
        self._losses: list[float] = []
        self._cells = evidence.Pooled()
        self._sd = 0.0

    @property
    def incumbent(self) -> Incumbent:
        """Runs of the tip."""
        return self.incumbents[self.tip]

    @property
    def pool(self) -> evidence.Pooled:
        """Squares of everything that was repeated, unpaired."""
        return self._cells.plus(self._losses)

    @property
    def sd(self) -> float:
        """Run-to-run sd between seeds; infinite before anything was repeated."""
        if not self._sd:
            pool = self.pool
            self._sd = max(pool.sd, self.floor, 1e-12) if pool.degrees else math.inf
        return self._sd

    def calibrated(self) -> None:
        """The start's runs are there: patches' spreads can be learned from now on."""
        self.pairing, self.apart = Pairing(self.sd, self.floor), Pairing(self.sd, self.floor)

    def incumbent_ran(self, loss: float, seed: int) -> None:
        """A run of the tip."""
        self.incumbent.read(loss, self.settings.cap, seed=seed)
        self._losses.append(loss)
        self._sd = 0.0

    def repeated(self, losses: Sequence[float]) -> None:
        """Runs of one tree that is not the tip."""
        self._cells = self._cells.plus(losses)
        self._sd = 0.0

    def fitted(self, squares: float, degrees: int) -> None:
        """What a weighing design left unexplained."""
        self._cells = evidence.Pooled(self._cells.squares + squares, self._cells.degrees + degrees)
        self._sd = 0.0

    def forget(self) -> None:
        """The machine changed: earlier runs of the tip are no measure of it, though their spread is."""
        self._cells, self._losses = self.pool, []
        self.incumbents[self.tip] = Incumbent()

    def move(self) -> Incumbent:
        """A new tip, of which nothing has run."""
        self._cells, self._losses = self.pool, []
        self.tip += 1
        self.incumbents[self.tip] = Incumbent()
        return self.incumbent

    def place(self, names: Iterable[str], place: Place) -> None:
        """Put these where they still live."""
        for name in names:
            if name in self.candidates:
                self.candidates[name].place = place

    def belief(self, candidate: Candidate) -> Belief:
        """By the gear's own noise."""
        if self.gear == "weighing" or self.pairing is None:
            return candidate.weighed(self.sd)
        return candidate.matched(self.pairing.typical, self.settings.expected)

    def best_first(self, among: Iterable[Candidate]) -> list[Candidate]:
        """By what is expected of each. Far beyond the prior all means are its end and differ by rounding alone: there
        what was measured decides."""
        return sorted(among, key=lambda c: (-float(f"{self.belief(c).mean:.6g}"), -c.measured))

    def clique(self, among: Iterable[Candidate], most: int) -> list[Candidate]:
        """Candidates that all merge with each other, the most promising first."""
        chosen: list[Candidate] = []
        for candidate in self.best_first(among):
            if len(chosen) < most and not any(c.name in candidate.clashes for c in chosen):
                chosen.append(candidate)
        return chosen

    def expected(self, unit: Iterable[Candidate]) -> float:
        """Gain of a bundle."""
        return DEPLETION * math.fsum(self.belief(c).mean for c in unit)

    def ripe(self, unit: Sequence[Candidate], ending: bool) -> bool:
        """Whether a unit is expected to pass, or will not grow any more."""
        settings, expected = self.settings, self.expected(unit)
        needed = settings.trigger * self.sd if self.gear == "weighing" else settings.ratio * self._pair_sd(unit)
        if not settings.bundles:
            needed /= 3  # it will not grow; what is far too small to be shown would only spend the level
        growing = any(c.place in ("screening", "weighing") for c in self.candidates.values())
        return expected >= needed or len(unit) >= settings.most or (
            ending and settings.bundles and not growing and expected >= needed / 3)

    def looks(self, unit: Sequence[Candidate], level: float) -> tuple[int, ...]:
        """Planned looks of a certification, by what is expected before it starts: the t test's first one comes where
        most of the expected effect lies one standard error beyond what its level needs."""
        if self.gear == "weighing":
            return self.settings.pairs
        signal = CAUTION * self.expected(unit) / self._pair_sd(unit)
        fewest, most = self.settings.first
        first = next((n for n in range(fewest, most)
                      if signal * math.sqrt(n) - 1 >= evidence.quantile(level / 2, n)), most)
        return first, first + self.settings.second

    def _pair_sd(self, unit: Iterable[Candidate]) -> float:
        return math.sqrt(math.fsum(self.belief(c).sd ** 2 for c in unit))
