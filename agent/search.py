"""Search: an optimiser that moves numeric constants (knobs.py), one knob a proposal.

First each knob is moved once or twice alone, the likeliest first; what these moves did says which knobs matter. Then
Optuna's TPE (Watanabe 2023, arXiv 2304.11127) proposes values for one of those that matter at a time, the others held
at the tip's. It keeps nothing: before each proposal it reads the ledger again, proposals of others that changed knobs
alone included, so a resumed campaign proposes what an uninterrupted one would have. Effects come from the briefing
(val split, three decimals): it sees no more than a model does.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent import knobs
from agent.knobs import Knob
from agent.ledger import State
from agent.propose import Proposer, proposal_id, tidy_title
from agent.read import Briefing
from agent.records import Proposal

Value = float | int | bool
Files = Mapping[str, str]

LIKELY = ((re.compile(r"lr|learning_rate|rate"), 5.0), (re.compile(r"beta"), 4.0),
          (re.compile(r"warm|cool|anneal|schedule"), 4.0), (re.compile(r"init|std|scale|gain"), 3.0),
          (re.compile(r"momentum|decay|dropout|batch|clip"), 2.0))
"""How likely a knob of such a name is to matter in a training repo; others count 1."""
PIN = 0.002
"""Effect below which a knob is taken not to matter here, in the metric's unit, where nothing better is known."""
WIDE = 3.0
"""TPE looks this many moves to either side of the tip's value."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempt that changed knobs alone. Of ``effect``, negative is better whatever the metric; None: not known, or
    failed."""

    base: str
    changes: tuple[tuple[str, Value, Value], ...]
    """(key, before, after)"""
    effect: float | None
    failed: bool


class KnobSearch:
    """Proposes one knob at a time. ``files_at`` gives the editable text files of a commit of the campaign's clone."""

    def __init__(self, state: State, files_at: Callable[[str], Files], seed: int,
                 mode: Literal["search", "random"] = "search") -> None:
        self._state, self._files_at, self._seed, self._mode = state, files_at, seed, mode
        self._cache: dict[str, tuple[dict[str, str], dict[str, Knob]]] = {}
        self._pending: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self.name: str = mode
        self.ended = ""

    def next(self, briefing: Briefing) -> Proposal | None:
        with self._lock:
            found = knobs.find(briefing.files)
            trials = self.trials(briefing)
            self._pending |= self._asked()
            tried = {(key, repr(after)) for trial in trials for key, _, after in trial.changes if len(
                trial.changes) == 1} | self._pending
            # seeded by what was tried, so that a resumed campaign and an uninterrupted one agree
            rng = random.Random(f"{self._seed} {briefing.tip} {briefing.number}")
            move = (self._random(found, tried, rng) if self._mode == "random" else
                    self._sweep(found, trials, tried, briefing) or self._tpe(found, trials, tried, briefing))
            if move is None:
                self.ended = "no knob of the source is left to move" if found else "the source has no numeric constants"
                return None
            key, value, why = move
            self._pending.add((key, repr(value)))
            knob = found[key]
            title = tidy_title(f"Set {knob.name} from {knob.value!r} to {value!r}")
            return Proposal(id=proposal_id(briefing.number, title), base=briefing.tip, title=title, hypothesis=why,
                            author="search", edits=knobs.edits(briefing.files, {key: value}),
                            direction="hyper-parameters", source=f"{self._mode} {key}={value!r}")

    def _asked(self) -> set[tuple[str, str]]:
        """(key, value) of each own proposal in the ledger, those included that no longer could be built."""
        sources = [attempt.proposal.source for attempt in list(self._state.attempts.values())
                   if attempt.proposal.author == "search"]
        parts = [source.partition(" ")[2].rpartition("=") for source in sources]
        return {(key, value) for key, _, value in parts}

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """None: a value cannot be mended."""
        return None

    def trials(self, briefing: Briefing) -> list[Trial]:
        """Every attempt of the ledger that changed knobs alone, in the order of the ledger."""
        sign = 1.0 if briefing.direction == "min" else -1.0
        effects = {line.id: line.effect for line in briefing.history}
        found = []
        for attempt in list(self._state.attempts.values()):
            if attempt.candidate is None:
                continue
            changes = self._changes(attempt.candidate.base, attempt.candidate.head)
            if changes:
                effect = effects.get(attempt.proposal.id)
                failed = bool(attempt.verdict and attempt.verdict.fault)
                found.append(Trial(attempt.candidate.base, changes, None if effect is None or failed else
                                   sign * effect, failed))
        return found

    def report(self, briefing: Briefing) -> str:
        """The optimiser's state in a few lines for a model's briefing; empty while it knows nothing."""
        gains = _sensitivity(self.trials(briefing))
        lines = [f"  {key}: moves tried {len(seen)}, largest effect {max(seen, key=abs):+.3f}, best {min(seen):+.3f}"
                 for key, seen in sorted(gains.items(), key=lambda item: min(item[1]))[:12]]
        return "\n".join(["An optimiser tunes single constants in the same campaign (negative is better); leave "
                          "them to it. So far:", *lines]) if lines else ""

    # -------------------------------------------------------------------------------------------------- the three moves

    def _random(self, found: Mapping[str, Knob], tried: set[tuple[str, str]], rng: random.Random
                ) -> tuple[str, Value, str] | None:
        for _ in range(200 if found else 0):
            key = rng.choice(sorted(found))
            value = found[key].moved(rng.uniform(-2, 2))
            if _fresh(found[key], value, tried):
                assert value is not None
                return key, value, "A random move of a random constant."
        return None

    def _sweep(self, found: Mapping[str, Knob], trials: list[Trial], tried: set[tuple[str, str]], briefing: Briefing
               ) -> tuple[str, Value, str] | None:
        """The next one-at-a-time move: a knob's first, or its second where the first one mattered."""
        seen = _sensitivity(trials)
        dead = _dead_files(found, seen)
        touched = {key for trial in trials for key, _, _ in trial.changes} | {key for key, _ in self._pending}
        best: tuple[float, str, Value] | None = None
        for key, knob in found.items():
            effects = seen.get(key, [])
            rank = _likely(knob, briefing.preset) * (0.02 if knob.path in dead else 1.0)
            first = 1 if random.Random(f"{self._seed} {key}").random() < 0.5 else -1
            if key not in touched:
                options = [float(first), float(-first)]
            elif (moves := [t.failed for t in trials if len(t.changes) == 1 and t.changes[0][0] == key]) and (
                    len(moves) == 1 and (moves[0] or any(e > PIN for e in effects))
                    and (start := _before(trials, key)) is not None):
                # it matters, and this was the wrong way: the other way comes before knobs of the same rank
                up = _after(trials, key) > start
                options, rank = [-1.0 if up else 1.0], rank * 1.5 + min(effects[0] if effects else 0.0, 0.1) * 20
            else:
                continue
            for power in options:
                value = knob.moved(power)
                if _fresh(knob, value, tried) and (best is None or rank > best[0]):
                    assert value is not None
                    best = (rank, key, value)
                    break
        if best is None or (best[0] < 1.0 and any(min(e) < -PIN for e in seen.values())):
            return None
        return best[1], best[2], "A move of this constant alone shows whether it matters and which way."

    def _tpe(self, found: Mapping[str, Knob], trials: list[Trial], tried: set[tuple[str, str]], briefing: Briefing
             ) -> tuple[str, Value, str] | None:
        seen = _sensitivity(trials)
        live = [key for key in sorted(found, key=lambda key: -max(map(abs, seen.get(key, [0.0]))))
                if found[key].scale != "switch" and any(abs(e) > PIN for e in seen.get(key, []))][:8]
        import optuna  # slow to import, and only a campaign that searches pays it
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        for turn, key in enumerate(_rotated(live, briefing.number)):
            knob = found[key]
            space: dict[str, Any] = {"power": optuna.distributions.FloatDistribution(-WIDE, WIDE)}
            study = optuna.create_study(sampler=optuna.samplers.TPESampler(
                seed=self._seed * 10_007 + briefing.number * 101 + turn, n_startup_trials=3))
            study.add_trial(optuna.trial.create_trial(params={"power": 0.0}, distributions=space, value=0.0))
            for trial in trials:
                power = _power(knob, trial)
                if power is None or not -WIDE <= power <= WIDE or len(trial.changes) != 1:
                    continue
                if trial.effect is None and not trial.failed:
                    continue
                study.add_trial(optuna.trial.create_trial(
                    params={"power": power}, distributions=space, value=trial.effect,
                    state=optuna.trial.TrialState.PRUNED if trial.effect is None else
                    optuna.trial.TrialState.COMPLETE))
            for _ in range(10):
                value = knob.moved(study.ask(space).params["power"])
                if _fresh(knob, value, tried):
                    assert value is not None
                    return key, value, "TPE's next value of a constant whose moves have shown an effect."
        return None

    def _changes(self, base: str, head: str) -> tuple[tuple[str, Value, Value], ...]:
        """Knobs that differ between two commits; empty where anything else differs, or a commit is gone."""
        old, new = self._at(base), self._at(head)
        if old is None or new is None or old[0] != new[0] or old[1].keys() != new[1].keys():
            return ()
        return tuple((key, knob.value, new[1][key].value) for key, knob in old[1].items()
                     if repr(knob.value) != repr(new[1][key].value))

    def _at(self, commit: str) -> tuple[dict[str, str], dict[str, Knob]] | None:
        if commit not in self._cache:
            files = self._files_at(commit)
            self._cache[commit] = knobs.skeleton(files), knobs.find(files)
        return self._cache[commit]


class Hybrid:
    """A model and the search by turns, sharing one ledger; the model is shown what the search knows. When one has
    ended the other goes on."""

    name = "hybrid"

    def __init__(self, model: Proposer, search: KnobSearch) -> None:
        self._model, self._search = model, search
        self.ended = ""

    def next(self, briefing: Briefing) -> Proposal | None:
        first_model = briefing.number % 2 == 1
        for use_model in (first_model, not first_model):
            proposal = self._model.next(self._told(briefing)) if use_model else self._search.next(briefing)
            if proposal is not None:
                return proposal
        self.ended = f"{self._model.ended}; {self._search.ended}"
        return None

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        if proposal.author == "search":
            return None
        return self._model.repair(self._told(briefing), proposal, problem)

    def _told(self, briefing: Briefing) -> Briefing:
        text = self._search.report(briefing)
        if not text:
            return briefing
        return dataclasses.replace(briefing, calibration=f"{briefing.calibration}\n{text}".strip())


class ThenSearch:
    """The idea book, and the search when that is exhausted."""

    def __init__(self, book: Proposer, search: KnobSearch) -> None:
        self._book, self._search = book, search
        self.name, self.ended = book.name, ""

    def next(self, briefing: Briefing) -> Proposal | None:
        proposal = self._book.next(briefing) or self._search.next(briefing)
        if proposal is None:
            self.ended = f"{self._book.ended}; {self._search.ended}"
        return proposal

    def repair(self, briefing: Briefing, proposal: Proposal, problem: str) -> Proposal | None:
        """None: neither a card nor a value can be mended."""
        return None


def _sensitivity(trials: list[Trial]) -> dict[str, list[float]]:
    """Effects of the moves of each knob alone, oldest first."""
    seen: dict[str, list[float]] = {}
    for trial in trials:
        if len(trial.changes) == 1 and trial.effect is not None:
            seen.setdefault(trial.changes[0][0], []).append(trial.effect)
    return seen


def _dead_files(found: Mapping[str, Knob], seen: Mapping[str, list[float]]) -> set[str]:
    """Files of which two or more knobs were moved and none did anything: not used at this preset."""
    paths: dict[str, list[float]] = {}
    for key, effects in seen.items():
        if key in found:
            paths.setdefault(found[key].path, []).extend(effects)
    return {path for path, effects in paths.items() if len(effects) >= 2 and not any(effects)}


def _likely(knob: Knob, preset: str) -> float:
    leaf = knob.name.lower()
    rank = max((weight for pattern, weight in LIKELY if pattern.search(leaf)), default=1.0)
    if preset and preset in re.split(r"[^a-z0-9]+", knob.path.lower()):
        rank *= 2
    if knob.scale == "switch" or knob.name.count("[") > 1 or len(repr(knob.value)) > 8:
        rank *= 0.3  # an off switch has no known size; many digits are a table of coefficients
    return rank


def _fresh(knob: Knob, value: Value | None, tried: set[tuple[str, str]]) -> bool:
    return value is not None and repr(value) != repr(knob.value) and (knob.key, repr(value)) not in tried


def _before(trials: list[Trial], key: str) -> Value | None:
    return next((t.changes[0][1] for t in trials if len(t.changes) == 1 and t.changes[0][0] == key), None)


def _after(trials: list[Trial], key: str) -> Value:
    return next(t.changes[0][2] for t in trials if len(t.changes) == 1 and t.changes[0][0] == key)


def _power(knob: Knob, trial: Trial) -> float | None:
    """Where a trial's value lies, in moves from the knob's present value; None where it moved from elsewhere."""
    for key, before, after in trial.changes:
        if key == knob.key and before == knob.value and knob.scale in knobs.FACTOR and after > 0:
            base = math.log(knobs.FACTOR[knob.scale])
            if knob.scale == "near_one":
                return math.log((1 - before) / (1 - after)) / base if after < 1 else None
            return math.log(after / before) / base
    return None


def _rotated(keys: list[str], number: int) -> list[str]:
    at = number % len(keys) if keys else 0
    return keys[at:] + keys[:at]
