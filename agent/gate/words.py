"""What the gate and its host say to each other. Losses and gains are in the metric's unit; a lower loss is better."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["calibrate", "screen", "weigh", "certify", "canary"]
Gear = Literal["weighing", "paired"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Fixed before the campaign. All but the first block were tuned once on simulated campaigns; no user needs them."""

    alpha: float = 0.10
    """False discovery rate of merged units, and chance of any merge in a campaign without a true effect."""
    gear: Literal["auto", "weighing", "paired"] = "auto"
    bundles: bool = True
    """False: each patch is certified and merged alone."""
    floor: float = 1e-9
    """Smallest sd of a paired difference that is believed: equal code can give bit-equal losses."""
    seed: int = 0
    """Of the random columns and rows of weighing designs."""
    first_seed: int = 1
    """Training seeds are counted from here; none is handed out twice for different purposes."""

    calibrate: int = 8
    """Runs of the start on seeds of their own; one seed is run twice."""
    soundings: tuple[int, int] = (8, 24)
    """First candidates that run on two seeds whatever they show, to learn how well patches pair: at least, and at most
    where that is not clear."""
    pairing: float = 0.76
    """The gear is paired when a patch's typical paired sd is below this share of the seed sd."""
    canary: int = 25
    """Screens between two runs of the incumbent, in the weighing gear."""
    cap: float = 12.0
    """Runs that the incumbent's mean remembers."""

    drop: float = 0.5
    """Weighing gear: a screened candidate is dropped below this gain, in seed sds."""
    fast: float = 0.95
    """Chance of a gain at which a candidate is staged without being weighed."""
    stage: float = 0.80
    """Chance of a gain at which a weighed candidate is staged."""
    retry: float = 0.50
    """Chance of a gain at which it is weighed a second time."""
    rounds: int = 2
    rows: int = 16
    """Runs of a full weighing design, of one candidate less."""
    most: int = 16
    """Patches of a bundle."""
    trigger: float = 5.66
    """Expected gain of a bundle, in seed sds, at which it is certified."""
    pairs: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    """Pairs after which the e-value is looked at."""

    keep: float = 0.20
    """Paired gear: chance of a gain below which a candidate is dropped."""
    sure: float = 0.95
    """Chance of a gain at which it is staged, after two seeds or more."""
    seeds: int = 15
    """Seeds after which an unsure candidate is dropped."""
    expected: float = 0.5
    """Gains that screening expects, as a multiple of ``evidence.prior``, in typical paired sds."""
    ratio: float = 1.5
    """Expected gain over the sd of one pair at which a bundle is certified."""
    first: tuple[int, int] = (3, 10)
    """Fewest and most pairs at the first of two looks: as many as its expected effect needs."""
    second: int = 6
    """Pairs more at the second look."""

    futile: float = 0.25
    """Share of the expected gain below which a certification is given up, from two pairs on."""
    ending: int = 40
    """Runs left at which no new proposals are drawn before what is known has been weighed and certified."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One training run that the gate wants: the patches ``arm`` switched on over the tip after ``tip`` merges, on
    ``seed``. An empty arm is the incumbent. Runs of one certification that share a seed share a device, in this order.
    """

    id: int
    stage: Stage
    arm: tuple[str, ...]
    seed: int
    tip: int


@dataclass(frozen=True, slots=True)
class Draw:
    """A slot is free for a new candidate: the host may admit one, and ask again."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """The end of one candidate, or of all candidates of a merge unit.

    After "accepted" the gate asks for nothing until it hears ``moved`` or ``refused``.
    """

    outcome: Literal["accepted", "rejected", "inconclusive"]
    unit: tuple[str, ...]
    reason: str
    evidence: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """A certification that a bundle did not pass, or that was given up: what becomes of its members is said apart."""

    unit: tuple[str, ...]
    reason: str
    evidence: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """The incumbent, or the machine, fails: nothing is asked for until ``resume``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of an ask: a loss, or the fault that took its place. "infra" is the machine's own."""

    value: float | None
    fault: str | None = None

    @property
    def loss(self) -> float:
        """Raises ValueError for a fault."""
        if self.value is None:
            raise ValueError(f"a run that ended in {self.fault} has no loss")
        return self.value
