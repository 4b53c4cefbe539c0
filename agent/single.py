"""Single: each candidate is screened and certified alone, by judge.py.

A candidate is screened on seeds that the incumbent has run, then certified on fresh ones. When one is merged the others
start over on the new tip. For campaigns that are too short for bundles, and for owners who want every merged patch
certified by itself (``[judge] policy = "single"``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from agent import audits, guards
from agent.court import (
    RECHARGES,
    Conclusion,
    Host,
    Trial,
    failed_seeds,
    overspent,
    recharge,
    recharged_before,
)
from agent.evidence import Pooled
from agent.judge import SCREENS, Ruling, Standing, judge
from agent.needs import Need
from agent.records import Certification, Pair

SEEDS_APART = 1000
"""Fresh seeds of certification h begin at this many times h after the first seed."""


class Single:
    """One certification a candidate; see court.py for the methods."""

    restarts = True

    def __init__(self, host: Host) -> None:
        self._host = host
        self._pooled = Pooled(2 * host.rule.floor**2, 2), 0
        """Paired differences of the attempts judged so far, and how many attempts that were."""

    def first_seeds(self, count: int) -> list[int]:
        return self._screening_seeds(count)

    def enter(self, trial: Trial) -> None:
        trial.screens = 1

    def leave(self, trial: Trial) -> None:
        """Nothing is kept of it."""

    def restore(self, trial: Trial) -> None:
        recharged_before(trial)
        trial.screens = 1
        trial.standing = next((Standing(known.hypothesis, known.merges)
                               for known in reversed(self._host.state.certifications)
                               if (known.candidate, known.base, known.tree, known.steps) == (
                                   trial.id, trial.candidate.base, trial.candidate.tree,
                                   self._host.steps_of(trial))), None)

    def wants(self) -> Iterator[tuple[Need, str | None]]:
        """Slots go first to the trials that are nearest to a verdict. What no free slot could take is not named."""
        slots = self._host.needs.slots
        if slots.free(light=True) is None:
            return
        full = slots.free() is not None
        for trial in sorted(self._host.trials, key=lambda t: (-t.asked, t.attempt.number)):
            if trial.ready and (full or trial.due):
                for need in self._wants(trial):
                    yield need, trial.id

    def consider(self) -> None:
        for trial in list(self._host.trials):
            if trial in self._host.trials and trial.ready:
                self._consider(trial)

    def draws(self) -> bool:
        return True

    def pending(self) -> bool:
        """The campaign's own loop ends only when no trial has a run left."""
        return False

    def moved(self) -> None:
        """The trials started over by being built again."""

    # ------------------------------------------------------------------------------------------------------ one trial

    def _wants(self, trial: Trial) -> list[Need]:
        host, candidate = self._host, trial.candidate
        if trial.due:
            needs = [host.needs.audit(host.state.results[name]) for name in trial.due]
        else:
            steps, screening = host.steps_of(trial), self._screened_on(trial)[: trial.screens]
            needs = [need for seed in self._seeds(trial)
                     for need in (Need("pair", candidate.head, seed, steps,
                                       patch=candidate.patch if seed in screening else None),
                                  Need("baseline", host.state.tip, seed, host.bank.tip_steps))]
        return [need for need in needs if host.needs.known(need) is None and not host.needs.on_its_way(need)]

    def _consider(self, trial: Trial) -> None:
        """Form the pairs that are complete, ask the judge, and act on the ruling.

        Until it rules or asks for a run that is not known: after a stop the ledger may know all that it asks for.
        """
        host = self._host
        while True:
            self._check_charge(trial)
            if trial not in host.trials:
                return
            trial.pairs = self._pairs(trial)
            over = guards.complaint(host.site.config.guards, host.guarded(tuple(trial.pairs)))
            if over:
                host.close(trial.attempt, "measure", over, pairs=tuple(trial.pairs))
                host.drop(trial)
                return
            standing, noise = trial.standing or Standing(), self._noise()
            ruling = judge(trial.pairs, host.rule, standing, noise)
            # a candidate that is behind on every finished seed may be dropped before the rest is in
            if len(trial.pairs) < trial.asked and not any(pair.fault for pair in trial.pairs) and not (
                    trial.pairs and isinstance(ruling, Ruling) and ruling.outcome == "rejected"):
                return
            trial.due = audits.due(trial.pairs, ruling, host.state) if audits.wanted(host.site.config) else []
            if trial.due:  # bulk answers alone carry nobody further
                return
            if isinstance(ruling, Ruling):
                fault = next((pair.fault for pair in trial.pairs if pair.fault), None)
                why = "".join(f" ({host.state.results[pair.candidate_run].message})"
                              for pair in trial.pairs if pair.fault)
                host.conclude(trial, Conclusion(
                    ruling.outcome, ruling.reason + why, ruling.estimate,
                    ruling.evidence | audits.evidence(trial.pairs, host.state), fault,
                    "measure" if fault else "judge"))
                return
            if not ruling.fresh and trial.standing is None:
                trial.screens = len(trial.pairs) + ruling.pairs
                continue
            if trial.standing is None:
                self._certify(trial)
            known = sum(pair.fresh for pair in trial.pairs)
            trial.fresh = known + (ruling.pairs if ruling.fresh else min(host.rule.looks))

    def _certify(self, trial: Trial) -> None:
        """Begin a certification: the ledger has its number, and so its level and seeds, before its first run."""
        state = self._host.state
        number = len(state.certifications) + 1
        self._host.ledger.append("certify", Certification(
            trial.id, trial.candidate.base, trial.candidate.tree, number, len(state.merges),
            self._host.steps_of(trial)))
        trial.standing = Standing(number, len(state.merges))

    def _check_charge(self, trial: Trial) -> None:
        """Void a run that cost far more than its tiny run promised; grant fewer steps, or refuse it if that repeats."""
        found = overspent(self._host, trial, self._seeds(trial))
        if found is None:
            return
        cost, limit = found
        if not recharge(self._host, trial, cost, limit):
            self._host.close(trial.attempt, "measure", f"it costs {cost:.1f} charged seconds where {limit:.1f} are "
                             f"allowed, after {RECHARGES} repeats with fewer steps", fault="timeout",
                             pairs=tuple(trial.pairs))
            self._host.drop(trial)
            return
        trial.screens, trial.fresh, trial.standing, trial.pairs = 1, 0, None, []

    # ---------------------------------------------------------------------------------------------------------- seeds

    def _seeds(self, trial: Trial) -> list[int]:
        """Seeds of all pairs that are wanted of a trial, the screening ones first."""
        return self._screened_on(trial)[: trial.screens] + self._fresh_seeds(trial)

    def _screened_on(self, trial: Trial) -> list[int]:
        """Screening seeds of a trial. On several GPUs each trial starts elsewhere: a seed belongs to a device."""
        site = self._host.site
        found = self._screening_seeds(max(SCREENS, len(site.devices)))
        shift = trial.attempt.number % len(found) if site.on_gpus else 0
        return found[shift:] + found[:shift]

    def _screening_seeds(self, count: int) -> list[int]:
        """``count`` seeds to compare with the tip on: those on which it was certified, then the first ones."""
        host = self._host
        tree, steps, first = host.bank.tree(host.state.tip), host.bank.tip_steps, host.site.config.seeds.first
        found = [run_.seed for run_ in host.state.alike.get((tree, steps), ())
                 if run_.purpose == "pair" and run_.seed >= first + SEEDS_APART]
        failed = len(host.bank.failed(host.state.tip))
        return failed_seeds(host, [*found, *range(first, first + count + failed)], count)

    def _fresh_seeds(self, trial: Trial) -> list[int]:
        """Seeds of a trial's certification: they follow from its number, so no other ever uses them."""
        if trial.standing is None or not trial.fresh:
            return []
        first = self._host.site.config.seeds.first + SEEDS_APART * trial.standing.hypothesis
        return failed_seeds(self._host, list(range(first, first + SEEDS_APART)), trial.fresh)

    def _pairs(self, trial: Trial) -> list[Pair]:
        """Complete pairs of a trial, the screening ones first."""
        steps, bank = self._host.steps_of(trial), self._host.bank
        screens = bank.pairs(trial.candidate, steps, self._screened_on(trial)[: trial.screens])
        fresh = bank.pairs(trial.candidate, steps, self._fresh_seeds(trial))
        return [*screens, *(dataclasses.replace(pair, fresh=True) for pair in fresh)]

    def _noise(self) -> float:
        """Usual sd of a paired difference on the selecting split: the floor, until attempts have shown their own."""
        known, counted = self._pooled
        judged = self._host.state.judged
        for attempt in judged[counted:]:
            assert attempt.verdict is not None
            known = known.plus([pair.effect(self._host.rule.select) for pair in attempt.verdict.pairs
                                if not pair.fault])
        self._pooled = known, len(judged)
        return known.sd
