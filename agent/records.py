"""The records that pass from room to room. Frozen; each goes to JSON and back unchanged (``to_json``, ``from_json``).

Effects are candidate minus incumbent in the metric's unit (bits per byte by default), so for a metric that is
minimised a negative effect is better. Every attempt ends in exactly one Verdict.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from sandbox.job import Fault, Result, Tier

Author = Literal["llm", "ideas", "search", "human", "gate"]
"""``gate``: a bundle of other attempts, made to be certified together."""
Stage = Literal["propose", "patch", "preflight", "measure", "judge", "merge"]
Outcome = Literal["accepted", "rejected", "inconclusive"]
OrderKind = Literal["pause", "resume", "stop", "stop-after-current", "steer", "forget", "veto", "revert", "approve"]
Purpose = Literal["baseline", "preflight", "pair", "final", "audit", "ablation", "weigh"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace the one place in ``path`` that reads ``search``. An empty ``search`` creates a new file."""

    path: str
    search: str
    replace: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What one proposal cost at a model endpoint."""

    usd: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Said:
    """One reply of a model, and what became of it."""

    model: str
    mode: str
    """Form that was asked for (edit_modes.py)."""
    form: str
    """Form that it came in; empty: no edits were found in it."""
    stage: Literal["", "propose", "patch", "preflight"] = ""
    """Where it was refused; empty: it was not, or not before its runs."""
    problem: str = ""
    placed: bool = True
    """Whether its edits had their place in the files."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of its proposal before it is tried; scored against what came of it
    (briefing/predictions.py)."""

    low: float | None = None
    high: float | None = None
    """Range in which it expects the effect, in the metric's unit; ``low`` <= ``high``."""
    step_cost: float | None = None
    """What it expects a step to cost, as a multiple of the incumbent's."""
    check: str = ""
    """How one would see cheaply that the patch does what it says."""
    different: str = ""
    """Of a retry: what is different from the attempt that it is like."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """An idea with its edits against ``base``. ``diff`` replaces ``edits`` when a person hands in a patch file."""

    id: str
    base: str
    title: str
    hypothesis: str
    author: Author
    edits: tuple[Edit, ...] = ()
    diff: str = ""
    direction: str = ""
    reference: str = ""
    expected_effect: float | None = None
    cost: Cost = Cost()
    source: str = ""
    """Where it came from: model name, card id, or patch file."""
    parts: tuple[str, ...] = ()
    """Of a bundle: the attempts that it is made of."""
    replies: tuple[Said, ...] = ()
    """Of a model: every reply that it gave for this proposal, repair rounds too, oldest first."""
    prediction: Prediction | None = None
    """Of a model's proposal."""
    prompt: str = ""
    """Of a model's proposal: hash of the templates and of the owner's guidance that it was asked with."""
    briefing: Cost = Cost()
    """Of a model's proposal: what its briefing alone comes to, prompt tokens estimated; a part of ``cost``."""


@dataclass(frozen=True, slots=True)
class Patch:
    """What the edits come to on ``base``: the diff that git makes of the two trees."""

    diff: str
    files: tuple[str, ...]
    added: int
    removed: int
    content_hash: str
    """sha256 of the resulting tree's blobs."""
    normalised_hash: str
    """sha256 of the diff without blank lines, comments, white space and line numbers: equal means duplicate."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A patch on a branch of the campaign's own clone. ``tree`` is what is measured and what may be merged."""

    id: str
    branch: str
    base: str
    head: str
    tree: str
    patch: Patch


@dataclass(frozen=True, slots=True)
class Run:
    """One job on behalf of a tree. ``folder`` is relative to the campaign's folder."""

    id: str
    purpose: Purpose
    tree: str
    seed: int
    steps: int
    device: str
    folder: str
    candidate: str | None = None
    splits: tuple[str, ...] = ()
    audits: str = ""
    """Id of the run whose weights are asked again; only of an audit."""

    @property
    def trains(self) -> bool:
        """Whether this is a training run of full length."""
        return self.purpose not in ("preflight", "audit")


@dataclass(frozen=True, slots=True)
class Pair:
    """Incumbent and candidate on one seed. Scores by split; a candidate that failed has a fault instead."""

    seed: int
    incumbent: dict[str, float]
    candidate: dict[str, float]
    incumbent_run: str
    candidate_run: str
    fault: Fault | None = None
    fresh: bool = False
    """On a seed that nothing had used before: counts as evidence. Else it only screened."""

    def effect(self, split: str) -> float:
        """Candidate minus incumbent on ``split``."""
        return self.candidate[split] - self.incumbent[split]


@dataclass(frozen=True, slots=True)
class Certification:
    """The start of a certification, written before its runs: its number and the merges so far fix its level."""

    candidate: str
    base: str
    """Tip on which the candidate stands."""
    tree: str
    hypothesis: int
    """Number of this certification in the campaign, from 1. Its fresh seeds follow from it."""
    merges: int
    steps: int = 0
    """Of the candidate's runs: after a run that cost too much, fewer steps are another certification."""
    gear: Literal["", "weighing", "paired"] = ""
    """Of the gate (agent/gate); empty: certified alone by judge.py, and what follows is not used."""
    looks: tuple[int, ...] = ()
    expected: float = 0.0
    """Gain that selection promised: only for giving up early."""
    sd: float = 0.0
    degrees: float = 0.0
    """Run-to-run sd of the weighing gear and its degrees of freedom."""
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean paired effect with its two-sided confidence interval."""

    split: str
    effect: float
    low: float
    high: float
    pairs: int
    sd: float
    """Standard deviation used for one pair (the observed one, or the floor if that is larger)."""
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Guard:
    """One measure beside the loss (guards.py)."""

    value: float
    """Of the candidate: a count, bytes, MiB or charged seconds."""
    ratio: float
    """To the start of the campaign."""
    pairs: int
    """Runs or pairs behind it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an attempt ended, and why. ``evidence`` is the judge's own account (statistic, threshold, rule)."""

    candidate: str
    outcome: Outcome
    stage: Stage
    reason: str
    fault: Fault | None = None
    estimate: Estimate | None = None
    pairs: tuple[Pair, ...] = ()
    evidence: dict[str, float | str] = field(default_factory=dict)
    tier: Tier | None = None
    """Where its numbers came from; None in verdicts that were written before this was kept."""
    level: int | None = None
    """Lowest isolation level of the runs behind it; None when nothing was run."""
    guards: dict[str, Guard] = field(default_factory=dict)
    """Measures beside the loss, against the start; empty where nothing was seen."""
    unit: str = ""
    """Of an accepted part of a bundle: the bundle's attempt, which alone was certified and merged."""


@dataclass(frozen=True, slots=True)
class Merge:
    """The accepted branch moved from ``old_tip`` to ``new_tip`` (a commit of exactly the measured ``tree``)."""

    candidate: str
    old_tip: str
    new_tip: str
    tree: str
    subject: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the tiny run said before a full run was spent."""

    candidate: str
    ok: bool
    reason: str
    fault: Fault | None = None
    ratio: float = 1.0
    """Step cost relative to the incumbent, measured in lock step."""
    steps: int = 0
    """Charged steps granted for the full run."""
    seconds: float = 0.0
    log_tail: str = ""


@dataclass(frozen=True, slots=True)
class Gain:
    """Start of the campaign against its tip, on the sealed final split and fresh seeds."""

    metric: str
    split: str
    effect: float
    low: float
    high: float
    pairs: tuple[Pair, ...] = ()
    start: float | None = None
    tip: float | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """What became of one change at another budget (promotion.py)."""

    of: str
    """The candidate whose merge it is; empty: start against tip."""
    title: str
    verdict: Literal["transfers", "shrinks", "does not show", "reverses", "not measured"]
    reason: str
    here: Estimate | None
    """At the campaign's budget."""
    there: Estimate | None
    """At the larger one."""
    kept: tuple[float, ...] = ()
    """Share of the effect that is left, and its interval; empty: there was none to compare with."""
    here_pairs: tuple[Pair, ...] = ()
    there_pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Promotion:
    """The tip of a campaign tried against its start at another preset or budget of the same target."""

    here: str
    """The campaign's preset and budget, as a person would say it."""
    there: str
    preset: str
    steps: float
    """Budget of the larger end, in its unit."""
    tip: str
    metric: str
    direction: Literal["min", "max"]
    split: str
    first_seed: int
    device: str
    parts: tuple[Transfer, ...]
    """The whole first, then each merge that was left out on its own."""


@dataclass(frozen=True, slots=True)
class Examined:
    """A commit of the accepted branch that the closing audit examines."""

    commit: str
    title: str
    tree: str
    """The tip without it; empty: it cannot be taken out alone."""
    steps: int
    """Steps granted to the tip without it."""
    margin: float
    """What its removal may lose, in the metric's unit."""
    candidate: str = ""
    """Attempt that it was merged from; empty: the ledger knows nothing of it."""
    note: str = ""
    """Why it cannot be taken out, or what a person should know of it."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a person told a running campaign from another terminal (agent/steering.py), as it was taken."""

    number: int
    """Its place in the run's orders, from 1: the same order is never taken twice."""
    kind: OrderKind
    text: str = ""
    """The words of a ``steer``; why, of the others."""
    candidate: str = ""
    """Id of the attempt that it is about."""
    given: str = ""
    """When it was given."""
    tree: str = ""
    """What was measured, of an ``approve``: another tree needs another one."""
    refused: str = ""
    """Why it was not followed; empty: it was."""


@dataclass(frozen=True, slots=True)
class Revert:
    """The accepted branch moved to a commit that takes one merge out of the tip again, because a person said so."""

    order: int
    candidate: str
    old_tip: str
    new_tip: str
    tree: str
    steps: int
    """Steps of the new tip's runs."""
    subject: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The start of a closing audit, written before its runs: it fixes seeds, looks, levels and margins."""

    audit: int
    """Number of the audit in the campaign, from 1. Its seeds follow from it."""
    tip: str
    steps: int
    """Steps of the tip's runs."""
    pairs: int
    alpha: float
    margin: float
    """What several removals together may lose."""
    commits: tuple[Examined, ...] = ()


@dataclass(frozen=True, slots=True)
class Ablation:
    """What was found of one commit of the audit, or of several together. A pair's incumbent is the tip."""

    audit: int
    commits: tuple[str, ...]
    tree: str
    outcome: Literal["keep", "remove", "undecided", "not separable"]
    reason: str
    estimate: Estimate | None = None
    pairs: tuple[Pair, ...] = ()
    evidence: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Removal:
    """The accepted branch moved to a commit (of exactly the measured ``tree``) that takes ``removes`` out again."""

    audit: int
    old_tip: str
    new_tip: str
    tree: str
    steps: int
    """Steps of the new tip's runs."""
    removes: tuple[str, ...]
    subject: str


@dataclass(frozen=True, slots=True)
class Sooner:
    """How much sooner the tip reaches the start's final training loss, over ``pairs`` seeds (agent/sooner.py)."""

    pairs: int
    reached: int
    """Pairs in which it gets there at all; the others are in no mean."""
    steps_saved: tuple[float, ...]
    seconds_saved: tuple[float, ...]
    """On the charging clock."""
    steps: float
    seconds: float
    """Means of the two."""
    steps_sd: float
    seconds_sd: float
    start_steps: float
    start_seconds: float
    """What the start's own runs took."""


@dataclass(frozen=True, slots=True)
class Closing:
    """The end of a closing audit: the tip that is left, and what it is worth against the campaign's start."""

    audit: int
    tip: str
    gain: Gain | None = None
    sooner: Sooner | None = None


__all__ = [
    "Ablation", "Author", "Candidate", "Certification", "Closing", "Cost", "Edit", "Estimate", "Examined",
    "Fault", "Gain", "Guard", "Merge", "Order", "OrderKind", "Outcome", "Pair", "Patch", "Plan", "Prediction",
    "Preflight", "Promotion", "Proposal", "Purpose", "Removal", "Result", "Revert", "Run", "Said", "Sooner", "Stage",
    "Tier", "Transfer", "Verdict", "from_json", "to_json",
]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(record: Any) -> Any:
    """Plain JSON values of a record."""
    kind: Any = type(record)
    return _adapter(kind).dump_python(record, mode="json")


def from_json(kind: type[T], value: Any) -> T:
    """A record from plain JSON values. Raises pydantic.ValidationError when they do not fit."""
    key: Any = kind
    result: T = _adapter(key).validate_python(value)
    return result
