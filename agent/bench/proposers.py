"""Bench ``proposers``: random, search, ideas and hybrid at equal numbers of runs on the default target's cpu preset.

Each proposer starts from the start commit with ``--budget`` runs. A proposal is screened by one run on the first seed;
one that looks better by more than ``PROMISING`` runs on two seeds more, and is kept when all three are better than the
incumbent's and their mean is by ``KEPT``. This is a screening policy and not the shipped gate: it spends its runs on
many proposals, and what it kept is measured again on fresh seeds, as ``best_loss``.

What looks better is charged as in a campaign: a run that costs more than the start's is repeated with fewer steps. What
would be kept is audited as there: a model that reads the answers is turned away.

A run is named by (tree, seed, steps, corpus, fingerprint). One that is known is looked up and not trained again,
whichever proposer asked; it still counts as one of the asker's runs. With ``--known FILE`` this holds across calls.

The hybrid needs a model: replies kept in a file (``--replies``, JSON lines of strings; those of a small model come with
the source), or an endpoint (``--model-url`` with ``--model``). With an endpoint it also plays alone, as ``model``; its
replies without a usable edit cost no run, so as many of them as runs end its turn. Does not cover: preflight.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import config, knobs, patch, proposers, resources
from agent.bench.finding import Finding
from agent.bench.known import SEEDS, Asked, Bank
from agent.errors import UserError
from agent.ground import Say, count, open_ground
from agent.ideas import IdeaBook, cards_of, packaged_ideas
from agent.ledger import Attempt, State
from agent.llm.parse_reply import Problem, parse_reply
from agent.llm.proposer import LlmProposer
from agent.policy import PatchRefused
from agent.propose import ProposeFailed, Proposer, proposal_id, tidy_title
from agent.read import Briefing, HistoryLine, brief
from agent.records import Candidate, Outcome, Proposal, Verdict
from agent.search import Hybrid, KnobSearch
from sandbox.job import Result

NAMES = ("random", "search", "ideas", "hybrid", "model")
ASKING = ("hybrid", "model")
"""They need a model."""
PLANTED = ("larger-unembedding-rate", "gentler-matrix-rate", "longer-adam-memory", "quieter-mlp-input",
           "later-warm-down")
"""Cards that each mend one numeric oversight of settings/cpu.py; no proposer is told which these are."""
PROMISING, KEPT = 0.006, 0.004
"""In val_bpb: a paired effect's sd is 0.002 to 0.008 on this preset (docs/LOG.md)."""
SOME_DAY = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
"""Of every commit: a proposer that draws by the tip draws the same again, and finds its runs known."""
KEPT_REPLIES = resources.PACKAGE.parent / "tests" / "data" / "replies" / "hybrid.jsonl"
"""Missing where only the package is installed."""
FIGURES = ("best_loss", "invalid_share", "duplicate_share", "planted_found", "runs", "audited_out")
AGAIN = 2_000_000_033
"""First seed of the runs that measure again."""


class Replies:
    """A model's kept replies, in their order."""

    name = "llm"

    def __init__(self, replies: Sequence[str]) -> None:
        self._left, self.ended = list(replies), ""

    def next(self, briefing: Briefing) -> Proposal | None:
        """Raises ProposeFailed for a reply without a usable edit."""
        if not self._left:
            self.ended = "every kept reply was used"
            return None
        found = parse_reply(self._left.pop(0), briefing.files)
        if isinstance(found, Problem):
            raise ProposeFailed(found.text)
        return Proposal(proposal_id(briefing.number, found.title), briefing.tip, tidy_title(found.title),
                        found.hypothesis, "llm", found.edits, diff=found.diff, direction=found.direction)

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """None: kept replies answer nothing."""
        return None


@dataclass(slots=True)
class Player:
    """One proposer with one seed on its way through its budget of runs."""

    bank: Bank
    budget: int
    state: State
    proposer: Proposer
    label: str
    runs: int = 0
    proposed: int = 0
    invalid: int = 0
    duplicate: int = 0
    audited_out: int = 0
    """Proposals that an audit turned away."""
    kept: list[str] = field(default_factory=list)
    tip_steps: int = 0
    history: list[HistoryLine] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tip_steps = self.bank.steps

    def play(self) -> None:
        """Until the budget is spent or nothing is left to propose."""
        self._ask([(self.state.tip, seed, self.tip_steps) for seed in SEEDS])
        while self.runs < self.budget and self.invalid < self.budget:
            drawn = []
            for _ in range(min(len(self.bank.ground.site.devices), self.budget - self.runs)):
                if not self.proposer.ended and (made := self._draw()):
                    drawn.append(made)
            if drawn:
                self._screen(drawn)
            elif self.proposer.ended:
                return

    def _draw(self) -> Candidate | None:
        """The next candidate; None where it is invalid, a duplicate, or nothing is left."""
        try:
            proposal = self.proposer.next(self.briefing())
        except ProposeFailed:
            self.proposed, self.invalid = self.proposed + 1, self.invalid + 1
            return None
        if proposal is None:
            return None
        self.proposed += 1
        attempt = Attempt(proposal, len(self.state.attempts) + 1)
        self.state.attempts[proposal.id] = attempt
        try:
            made = self._build(proposal)
        except PatchRefused as refused:
            self.invalid += 1
            self._close(attempt, "rejected", refused.reason, None)
            return None
        if made.patch.normalised_hash in self._seen or made.tree in self._seen:
            self.duplicate += 1
            self._close(attempt, "rejected", "the same change as an earlier one", None)
            return None
        self._seen |= {made.patch.normalised_hash, made.tree}
        attempt.candidate = made
        return made

    def _screen(self, drawn: Sequence[Candidate]) -> None:
        steps, tip = self.tip_steps, self.state.tip
        base = self._ask([(tip, SEEDS[0], steps)], charged=False)[0]
        found = self._ask([(made.head, SEEDS[0], steps) for made in drawn])
        for made, result in zip(drawn, found, strict=True):
            attempt = self.state.attempts[made.id]
            if result.fault or base.fault:
                self.invalid += 1
                attempt.verdict = Verdict(made.id, "rejected", "measure", "the run failed", fault=result.fault)
                continue
            effect, better, reason = _effect(result, base), False, "not better"
            room = self.budget - self.runs >= (2 if tip == self.state.tip else 3)
            if effect < -PROMISING and room and (fewer := self.bank.too_dear((made.head, SEEDS[0], steps))):
                again = self._ask([(made.head, SEEDS[0], fewer)])[0]
                effect, room = 0.0 if again.fault else _effect(again, base), self.budget - self.runs >= 2
                reason = f"not better with {fewer} steps, which cost what the start's cost"
                granted = fewer
            else:
                granted = steps
            if effect < -PROMISING and room:
                better, effect, reason = self._certify(attempt, effect, granted)
            self._close(attempt, "accepted" if better else "rejected", reason, effect)
            if better and attempt.candidate is not None:
                self.state.tip, self.tip_steps = attempt.candidate.head, granted
                self.kept.append(attempt.proposal.title)
                self.bank.ground.say(f"{self.label}: kept {attempt.proposal.title} ({effect:+.4f}), run {self.runs}")

    def _certify(self, attempt: Attempt, effect: float, steps: int) -> tuple[bool, float, str]:
        """(whether it is kept, mean effect, why) on all seeds, on the present tip."""
        made = attempt.candidate
        assert made is not None
        fresh: Sequence[int] = SEEDS[1:]
        if made.base != self.state.tip:
            try:
                attempt.candidate = made = self._build(replace(attempt.proposal, base=self.state.tip))
            except PatchRefused:
                return False, effect, "does not apply on what was kept meanwhile"
            fresh, steps = SEEDS, min(steps, self.tip_steps)
        base = self._ask([(self.state.tip, seed, self.tip_steps) for seed in SEEDS], charged=False)
        self._ask([(made.head, seed, steps) for seed in fresh])
        found = self._ask([(made.head, seed, steps) for seed in SEEDS], charged=False)
        effects = [_effect(a, b) for a, b in zip(found, base, strict=True) if not a.fault and not b.fault]
        if len(effects) < len(SEEDS) or max(effects) >= 0 or statistics.fmean(effects) >= -KEPT:
            return False, statistics.fmean(effects) if effects else effect, "not better on three seeds"
        if not self.bank.honest((made.head, SEEDS[0], steps)):
            self.audited_out += 1
            return False, 0.0, "its model answers otherwise when an audit asks"
        return True, statistics.fmean(effects), "better on three seeds"

    def _ask(self, wanted: Sequence[Asked], charged: bool = True) -> list[Result]:
        """``charged`` False: runs that were counted before."""
        self.runs += len(wanted) if charged else 0
        return self.bank.results(wanted, self.label)

    def _build(self, proposal: Proposal) -> Candidate:
        site = self.bank.ground.site
        return patch.build(site.repo, site.prefix, self.state.tip, proposal, site.config.source, SOME_DAY)

    def _close(self, attempt: Attempt, outcome: Outcome, reason: str, effect: float | None) -> None:
        attempt.verdict = Verdict(attempt.proposal.id, outcome, "judge" if effect is not None else "patch", reason)
        self.history.append(HistoryLine(attempt.proposal.id, attempt.proposal.title, outcome, attempt.verdict.stage,
                                        reason, None if effect is None else round(effect, 3)))

    def briefing(self) -> Briefing:
        """What the proposer may know."""
        site = self.bank.ground.site
        editable, protected = site.texts(self.state.tip)
        return replace(brief(site.config, self.state, editable, protected), history=tuple(self.history))


def options(parser: argparse.ArgumentParser) -> None:
    """The bench's own options."""
    parser.set_defaults(preset="cpu")
    parser.add_argument("--budget", type=count, default=50, help="training runs of each proposer")
    parser.add_argument("--slots", type=count, help="runs side by side, and proposals a round; all if left out")
    parser.add_argument("--seeds", type=count, default=1, help="seeds of each proposer; the median is told")
    parser.add_argument("--first-seed", type=count, default=1, help="the first of them")
    parser.add_argument("--only", default="", help=f"of {', '.join(NAMES)}; commas between")
    parser.add_argument("--quick", action="store_true", help="8 runs of 20 steps each: shows that it works, no more")
    parser.add_argument("--known", type=Path, help="file in which runs are kept and looked up across calls")
    parser.add_argument("--replies", type=Path, default=KEPT_REPLIES if KEPT_REPLIES.exists() else None,
                        help="kept replies of a model, for hybrid: JSON lines of strings")
    parser.add_argument("--model-url", default="", help="base URL of a model's server, for hybrid and for model")
    parser.add_argument("--model", default="", help="the model's name there")
    parser.add_argument("--model-set", action="append", default=[], metavar="KEY=VALUE",
                        help="a key of [model] in ratchet.toml, such as max_tokens=600; may be given again")


def measure(options: argparse.Namespace, say: Say) -> Finding:
    """Every proposer through its budget, then what each kept on fresh seeds."""
    names = [name.strip() for name in options.only.split(",") if name.strip()] or [
        name for name in NAMES if name not in ASKING or options.model_url or (name == "hybrid" and options.replies)]
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"There is no proposer {unknown[0]!r}.", f"Choose of {', '.join(NAMES)}.")
    if "hybrid" in names and not (options.replies or options.model_url):
        raise UserError("hybrid needs a model's replies.", "Give --replies FILE, or --model-url and --model.")
    if "model" in names and not options.model_url:
        raise UserError("model needs an endpoint.", "Give --model-url and --model.")
    if options.model_url:
        _model(options)
    if "hybrid" in names and not options.model_url:
        _replies(options.replies)  # before anything is trained
    if options.repo is not None:
        raise UserError("The oversights are known in the default target only.", "Leave --repo out.")
    with open_ground(options, "proposers", say) as ground:
        bank = Bank(ground, ground.steps(20 if options.quick else 0), options.known)
        bank.open()
        found = {name: [_played(bank, name, seed, options) for seed in
                        range(options.first_seed, options.first_seed + options.seeds)] for name in names}
        start = _again(bank, ground.start, bank.steps)
        device = ground.runs_on()
    facts = {name: {key: statistics.median(one[key] for one in rows) for key in FIGURES} | {"by_seed": rows}
             for name, rows in found.items()}
    table = [(name, f"{row['best_loss']:.4f}", f"{row['invalid_share']:.0%}", f"{row['duplicate_share']:.0%}",
              f"{row['planted_found']:g}", f"{row['runs']:g}") for name, row in facts.items()]
    return Finding(f"{len(names)} proposers at equal runs, medians over {options.seeds} seeds, {device}",
                   {"proposers": facts, "start_loss": start, "trained": bank.trained, "device": device},
                   ("proposer", "loss", "invalid", "duplicate", f"planted of {len(PLANTED)}", "runs"), table,
                   [f"start on the same fresh seeds: {start:.4f}; {bank.trained} runs were trained"])


def _played(bank: Bank, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    state = State(tip=bank.ground.start)
    player = Player(bank, 8 if options.quick else options.budget, state, _proposer(bank, name, state, seed, options),
                    f"{name} {seed}")
    player.play()
    start, tip = (knobs.find(bank.ground.site.texts(commit)[0]) for commit in (bank.ground.start, state.tip))
    planted = [card for card in PLANTED if mended(card, start, tip)]
    return {"seed": seed, "best_loss": _again(bank, state.tip, player.tip_steps), "audited_out": player.audited_out,
            "invalid_share": player.invalid / max(1, player.proposed),
            "duplicate_share": player.duplicate / max(1, player.proposed), "planted_found": len(planted),
            "runs": player.runs, "proposals": player.proposed, "planted": planted, "kept": player.kept}


def _proposer(bank: Bank, name: str, state: State, seed: int, options: argparse.Namespace) -> Proposer:
    search = KnobSearch(state, lambda commit: bank.ground.site.texts(commit)[0], seed,
                        "random" if name == "random" else "search")
    if name in ("random", "search"):
        return search
    if name == "ideas":
        return IdeaBook(packaged_ideas(resources.prompts() / "ideas"), seed)
    if options.model_url:
        model = _model(options)
        asked = LlmProposer(proposers.open_endpoint(model), model, resources.prompts())
        return asked if name == "model" else Hybrid(asked, search)
    return Hybrid(Replies(_replies(options.replies)), search)


def _model(options: argparse.Namespace) -> config.Model:
    """[model] as the options have it. Raises UserError."""
    try:
        given = tomllib.loads("\n".join(options.model_set))
        return config.Model.model_validate(given | {"base_url": options.model_url, "name": options.model})
    except ValueError as error:
        raise UserError(f"--model-set cannot be read ({' '.join(str(error).split())}).",
                        "KEY=VALUE as in [model] of ratchet.toml; docs/configuration.md has the keys.") from error


def _replies(path: Path) -> list[str]:
    """Kept replies of a model. Raises UserError."""
    try:
        return [str(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot read the replies {path} ({error}).", "One JSON string a line.") from error


def mended(card: str, start: dict[str, knobs.Knob], tip: dict[str, knobs.Knob]) -> bool:
    """Whether a constant that ``card`` changes went half of the card's way or more, in its own scale."""
    files: dict[str, str] = {}
    for edit in cards_of([card], None)[0].edits:
        files[edit.path] = (resources.default_target() / edit.path).read_text(encoding="utf-8").replace(
            edit.search, edit.replace)
    for key, after in knobs.find(files).items():
        if key not in start or key not in tip or start[key].value == after.value:
            continue
        wanted, gone = _way(start[key], after.value), _way(start[key], tip[key].value)
        if gone / wanted >= 0.5:
            return True
    return False


def _way(knob: knobs.Knob, value: float) -> float:
    if knob.scale == "near_one":
        return math.log((1 - knob.value) / (1 - value)) if value < 1 else math.inf
    return math.log(value / knob.value) if value > 0 else -math.inf


def _effect(result: Result, base: Result) -> float:
    return result.scores["val"].value - base.scores["val"].value


def _again(bank: Bank, commit: str, steps: int) -> float:
    """Mean loss on fresh seeds. Raises UserError where a run fails."""
    found = bank.results([(commit, AGAIN + number, steps) for number in range(3)], "again")
    if any(result.fault for result in found):
        raise UserError("What was kept fails on a fresh seed.", "Run the bench again with another --first-seed.")
    return statistics.fmean(result.scores["val"].value for result in found)
