"""Court: what a campaign asks of the part that decides. Which runs come next, and what becomes of a candidate.

There are two, chosen once when the campaign opens (``[judge] policy``):

    single.py   each candidate is screened and certified alone, by judge.py: for short campaigns
    bundles.py  agent/gate: candidates are screened, weighed where runs are noisy, and certified in bundles

The campaign builds candidates, sends them through their tiny run, starts the runs that a court wants and records what
ended. The court says what is concluded of it; the campaign (the court's ``Host``) writes the verdict and merges. Courts
keep nothing that cannot be rebuilt from the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent import charge
from agent.bank import Bank
from agent.judge import Rule, Standing
from agent.ledger import Attempt, Clock, Ledger, State
from agent.measure import Slots
from agent.needs import Need, Needs
from agent.records import Candidate, Estimate, Fault, Guard, Outcome, Pair, Proposal, Stage
from agent.site import Site
from agent.spending import Spending

RECHARGES = 2
"""Times a run that cost too much is repeated with fewer steps before the candidate is refused."""


@dataclass(slots=True)
class Trial:
    """A candidate between its patch and its verdict."""

    attempt: Attempt
    candidate: Candidate
    repairs: int = 0
    ready: bool = False
    """It passed its tiny run on this tip, or needs none."""
    pairs: list[Pair] = field(default_factory=list)
    screens: int = 0
    """Pairs that the judge wants on the incumbent's seeds."""
    fresh: int = 0
    """Pairs that it wants on fresh seeds."""
    standing: Standing | None = None
    """Its certification, once one has begun."""
    recharged: int = 0
    """Steps granted anew after a run that cost more than it was charged."""
    voided: int = 0
    """Times that happened."""
    due: list[str] = field(default_factory=list)
    """Runs of it that must be audited before it goes on."""

    @property
    def id(self) -> str:
        return self.candidate.id

    @property
    def asked(self) -> int:
        """Pairs wanted so far: how near it is to a verdict."""
        return self.screens + self.fresh


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a court decided of one trial."""

    outcome: Outcome
    reason: str
    estimate: Estimate | None
    evidence: dict[str, float | str]
    fault: Fault | None = None
    stage: Stage = "judge"
    unit: str = ""
    """Of a part of an accepted bundle: the bundle."""


class Host(Protocol):
    """What a court may ask of the campaign."""

    site: Site
    ledger: Ledger
    bank: Bank
    needs: Needs
    slots: Slots
    spending: Spending
    trials: list[Trial]
    rule: Rule
    clock: Clock

    @property
    def state(self) -> State: ...

    def conclude(self, trial: Trial, found: Conclusion) -> None:
        """Write the verdict of a trial and take it off the slots; an accepted one is merged."""

    def close(self, attempt: Attempt, stage: Stage, reason: str, outcome: str = "rejected",
              fault: Fault | None = None, pairs: tuple[Pair, ...] = ()) -> None:
        """A verdict on other grounds than the judge's."""

    def drop(self, trial: Trial) -> None:
        """Take a trial off the slots."""

    def bundle(self, parts: Sequence[Attempt], proposal: Proposal) -> Trial | None:
        """A new attempt made of others; None where their patches do not fit together."""

    def more(self) -> bool:
        """Whether there may be more proposals."""

    def guarded(self, pairs: tuple[Pair, ...]) -> dict[str, Guard]:
        """What a candidate costs beside the loss."""

    def steps_of(self, trial: Trial) -> int:
        """Steps of its full runs."""

    def note(self, text: str) -> None:
        """For the reader of the ledger."""


class Court(Protocol):
    """Decides. Called by the campaign alone, from one thread."""

    restarts: bool
    """Whether trials start over when the tip moves, so that their runs on the old one are worth nothing."""

    def first_seeds(self, count: int) -> list[int]:
        """Seeds on which the tip is trained before anything else."""

    def enter(self, trial: Trial) -> None:
        """A trial passed its tiny run, or needs none."""

    def leave(self, trial: Trial) -> None:
        """A trial was taken off for other reasons than this court's."""

    def restore(self, trial: Trial) -> None:
        """A trial that an earlier process had begun, which passed its tiny run."""

    def wants(self) -> Iterator[tuple[Need, str | None]]:
        """Runs that are not known and not on their way, the most wanted first, each with the trial it belongs to."""

    def consider(self) -> None:
        """Take every decision that the known runs allow."""

    def draws(self) -> bool:
        """Whether a new candidate may come now."""

    def pending(self) -> bool:
        """Whether there are runs left to be made of the candidates there are."""

    def moved(self) -> None:
        """The tip moved, and the trials were built again on it."""


def overspent(host: Host, trial: Trial, seeds: Sequence[int]) -> tuple[float, float] | None:
    """(charged seconds, those allowed) where the trial's known runs on ``seeds`` cost far more than its tiny run
    promised; see charge.py."""
    budget, bank = host.site.config.budget, host.bank
    if budget.unit != "charged_steps":
        return None
    known = [r for seed in seeds if (r := bank.incumbent(seed)) and not r.fault]
    own = [r for seed in seeds if (r := bank.result(trial.candidate.tree, seed, host.steps_of(trial))) and not r.fault]
    if not known or not own:
        return None
    first = bank.at_start()
    # never more than the start was allowed: five merges that each cost 10 % more would else buy 60 %
    limit = min(charge.allowed(runs_, budget.dead_band) for runs_ in (known, first) if runs_)
    cost = charge.cost(own, max((r.startup_charge for r in first), default=0.0),
                       max((r.evaluate_charge for r in first), default=0.0), host.site.devices[0])
    return (cost, limit) if cost > limit else None


def recharge(host: Host, trial: Trial, cost: float, limit: float) -> bool:
    """Grant fewer steps after a run that cost too much, which is void; False where that has been done too often."""
    if trial.voided >= RECHARGES:
        return False
    trial.voided += 1
    trial.recharged = charge.fewer_steps(host.steps_of(trial), cost, limit, host.site.config.budget.dead_band)
    host.ledger.append("note", {"text": f"{trial.id}: a run cost {cost:.1f} charged seconds where {limit:.1f} "
                                        f"are allowed; it is void and repeated with {trial.recharged} steps"})
    return True


def recharged_before(trial: Trial) -> None:
    """What the ledger knows of steps granted anew."""
    steps = list(dict.fromkeys(r.steps for r in trial.attempt.runs
                               if r.purpose == "pair" and r.tree == trial.candidate.tree))
    if len(steps) > 1:  # a run of it was void and repeated with fewer
        trial.recharged, trial.voided = steps[-1], len(steps) - 1


def failed_seeds(host: Host, seeds: Sequence[int], count: int) -> list[int]:
    """The first ``count`` different seeds but for those on which the tip itself failed: nothing can be compared
    there."""
    failed = host.bank.failed(host.state.tip)
    return [seed for seed in dict.fromkeys(seeds) if seed not in failed][:count]

