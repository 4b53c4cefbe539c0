"""The closing audit of a finished campaign: is each merge still worth having in the tip that came of them all?

    plan        the commits from the campaign's start to the accepted tip, and the tip without each
    ablate      the tip against the tip without each, on fresh seeds; a commit drops out once it is decided
    combine     where several may go, the tip without all of them, on other fresh seeds
    remove      one commit on the accepted branch, whose tree is the one that was measured
    again       after what does harm was taken out: the rest is asked again beside what is left, by an audit of its own
    close       start against the tip that is left, and how much sooner that tip is where the start ends

It works in the campaign's folder: its clone, ledger, bank and slots. So every run and decision is in the ledger, runs
are found again by what they are, and after a kill the same command goes on. The plan is written before the first run
and fixes seeds, looks, levels and margins (ablation.py); a finished audit is only shown again, unless the accepted
branch has moved since. n seeds cost at most n * (1 + merges) runs, as all ablations share the tip's run of a seed.

Commits that the ledger does not know are examined like the rest. Where the tip itself fails on its first two seeds, a
commit without which it runs there is removed for that. Ablations are judged on the split that certifies, never on the
final one. In the sealed tier the tip's first run is audited, and of a tree that would replace it the first and the
last run.

Does not cover: pairs of merges that help only together, and what a commit that the ledger does not know adds to the
cost of a step (its runs are given the tip's steps).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path

from agent import ablation, audits, git, merge, report, runs
from agent.audit_plan import plan, runs_at_most
from agent.bank import Bank
from agent.config import Config
from agent.errors import UserError
from agent.judge import Rule, estimate, rule_of
from agent.ledger import Clock, Ledger, State, replay, utc_now
from agent.measure import Slots, forget_weights
from agent.needs import Need, Needs
from agent.opening import Options, reopen_finished
from agent.records import Ablation, Closing, Gain, Pair, Plan, Result, Run
from agent.show.screen import Observer
from agent.site import Site
from agent.sooner import sooner
from sandbox import gpu
from sandbox.engine import Engine

ALONE_SEED, TOGETHER_SEED, GAIN_SEED = 1_500_000_001, 1_600_000_009, 1_700_000_009
"""First seeds of the three kinds of an audit's pairs; nothing else in a campaign uses seeds from there on."""
APART = 10_000
"""Seeds of one audit of each kind."""
INFRA_TRIES = 3
FAILING = 2
"""Seeds on which the tip must fail before it counts as broken."""
PAIRS = 8


def audit(options: Options, name: str, pairs: int | None, observer: Observer, clock: Clock = utc_now) -> State:
    """Audit the finished run ``name`` to its end, and write its report again. Raises UserError."""
    folder = runs.resolve(options.runs.resolve(), name)
    with runs.lock(folder), contextlib.ExitStack() as at_end:
        ledger = Ledger(folder / "ledger.jsonl", clock)
        try:
            check_finished(ledger.state, folder)
            if closed(ledger.state, folder / "repo.git"):
                if pairs not in (None, ledger.state.plans[-1].pairs):
                    raise UserError(f"Run {folder.name} was audited with {ledger.state.plans[-1].pairs} pairs, and "
                                    "looking again would make its error rate void.", "Leave out --pairs.")
            else:
                closing = _open(options, folder, ledger, pairs, observer, clock, at_end)
                closing.whole()
                while unsettled(ledger.state):
                    drawn = _draw(ledger, folder / "repo.git", closing.site.config, pairs, observer)
                    closing = ClosingAudit(closing.site, closing.engine, ledger, drawn, observer, clock)
                    closing.whole()
                report.write(ledger.state, folder)
        finally:
            ledger.close()
    return ledger.state


def check_finished(state: State, folder: Path) -> None:
    """Raises UserError where there is nothing to audit yet."""
    if state.phase != "finished":
        raise UserError(f"Run {folder.name} is not finished.", "Let it end, or go on with it, then audit it.")


def closed(state: State, repo: Path) -> bool:
    """Whether the newest audit came to its end, left nothing to ask again, and the accepted branch is where it left
    it."""
    return bool(state.closings) and len(state.closings) == len(state.plans) and (
        not unsettled(state)) and (
        git.resolve(repo, git.ACCEPTED) == state.closings[-1].tip)


def unsettled(state: State) -> bool:
    """Whether the newest audit left something to ask again."""
    return ablation.unsettled(len(state.plans), state.ablations, state.removals)


def _open(options: Options, folder: Path, ledger: Ledger, pairs: int | None, observer: Observer, clock: Clock,
          at_end: contextlib.ExitStack) -> ClosingAudit:
    state, repo = ledger.state, folder / "repo.git"
    config = Config.model_validate(state.campaign["config"])
    begun = len(state.plans) > len(state.closings)
    drawn = state.plans[-1] if begun else plan(state, repo, config, _pairs(state, pairs))
    unread = any(not one.candidate for one in drawn.commits)
    site, engine = reopen_finished(options, folder, state, unread, observer, at_end)
    if not begun:
        _draw(ledger, repo, config, pairs, observer)
    elif pairs not in (None, drawn.pairs):
        observer.note(f"going on with the audit that was begun, with {drawn.pairs} pairs")
    return ClosingAudit(site, engine, ledger, state.plans[-1], observer, clock)


def _draw(ledger: Ledger, repo: Path, config: Config, pairs: int | None, observer: Observer) -> Plan:
    """Write the plan of a new audit."""
    drawn = plan(ledger.state, repo, config, _pairs(ledger.state, pairs))
    for one in drawn.commits:
        if one.note:
            observer.note(f"{one.commit[:12]} {one.title}: {one.note}")
    ledger.append("audit", drawn)
    return drawn


def _pairs(state: State, wanted: int | None) -> int:
    """Pairs a commit: those wanted, those of the audit that is gone on with, or the usual ones."""
    return wanted or (state.plans[-1].pairs if unsettled(state) else PAIRS)


class ClosingAudit:
    """One audit at work. All memory is the ledger's."""

    def __init__(self, site: Site, engine: Engine, ledger: Ledger, drawn: Plan, observer: Observer,
                 clock: Clock) -> None:
        self.site, self.engine, self.ledger, self.plan, self.observer, self.clock = (
            site, engine, ledger, drawn, observer, clock)
        self.bank, self.slots = Bank(site, ledger.state), Slots(site, engine)
        self.needs = Needs(site, ledger, self.bank, self.slots)
        config = site.config
        self.judge = rule_of(config.judge, config.metric.direction, config.evaluate.tier == "sealed")
        self.sign = 1.0 if config.metric.direction == "min" else -1.0
        self.asked = [one for one in drawn.commits if one.tree]
        self.rule = ablation.Rule(drawn.alpha, len(self.asked), ablation.looks_of(drawn.pairs), self.judge.floor)

    @property
    def state(self) -> State:
        return self.ledger.state

    @property
    def found(self) -> dict[tuple[str, ...], Ablation]:
        """Decisions of this audit so far."""
        return {one.commits: one for one in self.state.ablations if one.audit == self.plan.audit}

    def whole(self) -> None:
        """The order of the audit; after a kill, the rest of it."""
        try:
            for run_ in self.state.open_runs:
                result = self.slots.attach(run_)
                if result is not None:
                    self.ledger.append("run_finished", result)
            self.ablate()
            self.remove()
            self.close()
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            self.slots.stop(self.slots.busy)
            self.slots.close()

    def stop(self) -> None:
        """End the running jobs and record that they were stopped."""
        self.slots.stop(self.slots.busy)
        waited = 0.0
        while self.slots.busy and waited < 20:
            for _, result in self.slots.wait(1.0):
                self.ledger.append("run_finished", result)
            waited += 1.0

    # ------------------------------------------------------------------------------------------------ one at a time

    def ablate(self) -> None:
        """Decide on every commit that can be taken out alone, look by look."""
        for one in self.plan.commits:
            if not one.tree and (one.commit,) not in self.found:
                self.ledger.append("ablation", Ablation(self.plan.audit, (one.commit,), "", "not separable", one.note))
        self.observer.phase("closing audit: the tip without each merge")
        if not self.asked or all((one.commit,) in self.found for one in self.asked):
            return
        if self.broken():
            return self.mend()
        for look in self.rule.looks:
            open_ = [one for one in self.asked if (one.commit,) not in self.found]
            if not open_:
                return
            seeds = self.tip_seeds(ALONE_SEED, look)
            self.complete([Need("ablation", one.tree, seed, one.steps) for seed in seeds for one in open_])
            for one in open_:
                self.decide((one.commit,), one.tree, one.steps, one.margin, seeds)

    def broken(self) -> bool:
        """Whether the tip itself fails, alone or under the audit of its first run."""
        first = self.seeds(ALONE_SEED)[:FAILING]
        results = self.complete([Need("ablation", self.plan.tip, seed, self.plan.steps) for seed in first])
        good = [result for result in results if not result.fault]
        return not good or any(result.fault for result in self.audited(good[:1]))

    def mend(self) -> None:
        """The tip fails: a commit without which it runs, and passes the audit, is what breaks it."""
        seeds = self.seeds(ALONE_SEED)[:FAILING]
        for one in self.asked:
            runs_ = self.complete([Need("ablation", one.tree, seed, one.steps) for seed in seeds])
            sound = not any(r.fault for r in runs_) and not any(r.fault for r in self.audited([runs_[0], runs_[-1]]))
            reason = "the tip fails with it and runs without it" if sound else "the tip fails with it and without it"
            self.record(Ablation(self.plan.audit, (one.commit,), one.tree, "remove" if sound else "undecided", reason,
                                 evidence={"rule": ablation.FAILS}))

    def decide(self, commits: tuple[str, ...], tree: str, steps: int, margin: float, seeds: list[int]) -> None:
        """Write what these pairs show, if anything."""
        pairs = self.pairs(tree, steps, seeds)
        failed = next((pair for pair in pairs if pair.fault), None)
        shown = estimate(pairs, dataclasses.replace(self.judge, min_effect=0.0))
        if failed is not None:
            self.record(Ablation(self.plan.audit, commits, tree, "keep",
                                 f"without it the run on seed {failed.seed} fails: {failed.fault}", shown, pairs,
                                 {"fault": str(failed.fault)}))
            return
        decision = ablation.decide([self.sign * pair.effect(self.judge.split) for pair in pairs], margin, self.rule)
        if isinstance(decision, int):
            return
        if decision.outcome == "remove":
            ends = [self.state.results[pairs[0].candidate_run], self.state.results[pairs[-1].candidate_run]]
            if any(result.fault for result in self.audited(ends)):
                self.record(Ablation(self.plan.audit, commits, tree, "keep", "without it the model is not causal",
                                     shown, pairs, {"fault": "non_causal"}))
                return
            pairs = self.pairs(tree, steps, seeds)  # the audit may have corrected a score
            again = ablation.decide([self.sign * pair.effect(self.judge.split) for pair in pairs], margin, self.rule)
            decision = decision if isinstance(again, int) else again
            shown = estimate(pairs, dataclasses.replace(self.judge, min_effect=0.0))
        self.record(Ablation(self.plan.audit, commits, tree, decision.outcome, decision.reason, shown, pairs,
                             decision.evidence))

    def record(self, found: Ablation) -> None:
        self.ledger.append("ablation", found)
        self.observer.note(f"{found.outcome}: {'; '.join(self.title(c) for c in found.commits)}: {found.reason}")

    def pairs(self, tree: str, steps: int, seeds: list[int]) -> tuple[Pair, ...]:
        """The tip (incumbent) and ``tree`` on each seed. Raises UserError when a pair's fingerprints differ."""
        made = []
        for seed in seeds:
            old = self.bank.result(self.bank.tree(self.plan.tip), seed, self.plan.steps)
            new = self.bank.result(tree, seed, steps)
            assert old is not None and new is not None, "pairs are formed when their runs are known"
            if new.fault:
                made.append(Pair(seed, {}, {}, old.id, new.id, new.fault, fresh=True))
                continue
            if old.fingerprint != new.fingerprint:
                raise UserError(f"Runs {old.id} and {new.id} were made on different machines or versions.",
                                "They cannot be compared; audit a run on the machine that began its audit.")
            made.append(Pair(seed, self.bank.values(old), self.bank.values(new), old.id, new.id, fresh=True))
        return tuple(made)

    # -------------------------------------------------------------------------------------------------- the removal

    def remove(self) -> None:
        """Intent, compare-and-swap, outcome; nothing where nothing may go or the removal is done."""
        if self.state.pending_removal is None:
            if any(done.audit == self.plan.audit for done in self.state.removals):
                return
            chosen = self.chosen()
            if chosen is None:
                return
            conditions = self.conditions(chosen)
            prepared = merge.prepare_removal(self.site.repo, chosen, [self.title(c) for c in chosen.commits],
                                             self.plan.tip, self.steps_without(chosen.commits), conditions,
                                             self.clock())
            self.ledger.append("removal_intent", prepared)
        pending = self.state.pending_removal
        assert pending is not None
        try:
            merge.complete_merge(self.site.repo, pending)
        except git.RefMoved as moved:
            raise UserError(f"The accepted branch moved to {moved.actual[:12]} while it was audited.",
                            f"Move it back:  git --git-dir {self.site.repo} update-ref {git.ACCEPTED} "
                            f"{self.plan.tip[:12]}  and audit again.") from None
        self.ledger.append("removal", pending)

    def chosen(self) -> Ablation | None:
        """What is removed. Of what does harm one commit, for nobody knows yet what the others are worth without it:
        one that the ledger does not know before a certified one, then the worst. Else all that may go, where it is
        shown that they may go together, or the worst alone."""
        gone = [one for key, one in self.found.items() if len(key) == 1 and one.outcome == "remove"]
        known = {one.commit for one in self.plan.commits if one.candidate}
        gone.sort(key=lambda one: (one.commits[0] in known and ablation.harmful(one.evidence),
                                   self.sign * one.estimate.effect if one.estimate else float("-inf")))
        harmful = [one for one in gone if ablation.harmful(one.evidence)]
        if harmful or len(gone) < 2:
            return next(iter(harmful or gone), None)
        may_go = {one.commits[0] for one in gone}
        commits = tuple(one.commit for one in self.plan.commits if one.commit in may_go)
        if commits not in self.found:
            self.together(commits)
        both = self.found[commits]
        return both if both.outcome == "remove" else gone[0]

    def together(self, commits: tuple[str, ...]) -> None:
        """Measure the tip without all of ``commits`` on seeds of its own."""
        tree = git.without(self.site.repo, self.plan.tip, commits)
        if tree is None:
            self.record(Ablation(self.plan.audit, commits, "", "not separable", "they cannot be taken out together"))
            return
        self.observer.phase("closing audit: the tip without all that may go")
        broken, steps = self.broken(), self.steps_without(commits)
        if broken:
            self.record(Ablation(self.plan.audit, commits, tree, "undecided", "the tip fails: nothing to compare with"))
            return
        for look in self.rule.looks:
            if commits not in self.found:
                seeds = self.tip_seeds(TOGETHER_SEED, look)
                self.complete([Need("ablation", tree, seed, steps) for seed in seeds])
                self.decide(commits, tree, steps, self.plan.margin, seeds)

    def steps_without(self, commits: tuple[str, ...]) -> int:
        """Steps of the tip without these: each commit's own change of the tip's steps, and at most the start's."""
        if not self.plan.steps:
            return 0
        share = 1.0
        for one in self.plan.commits:
            if one.commit in commits:
                share *= one.steps / self.plan.steps
        return min(int(self.state.campaign["steps"]), round(self.plan.steps * share))

    def conditions(self, found: Ablation) -> merge.Conditions:
        """Under what the removed were measured."""
        config = self.site.config
        results = [self.state.results[run_.id] for run_ in self.state.runs.values()
                   if run_.tree == found.tree and run_.purpose == "ablation" and run_.id in self.state.results]
        steps = self.steps_without(found.commits)
        budget = f"{steps} {config.budget.unit.replace('_', ' ')}" if steps else f"{config.budget.amount:g} seconds"
        return merge.Conditions(config.metric.name, config.metric.direction, budget,
                                results[0].fingerprint.get("device", self.site.devices[0]),
                                min(r.level for r in results), config.evaluate.tier,
                                sum(r.seconds for r in results) * gpu.count(self.site.devices[0]),
                                self.site.on_gpus, str(self.state.campaign["name"]))

    # ------------------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Start against the tip that is left, on seeds of this audit: the gain, and the time to the start's loss."""
        start, tip = str(self.state.campaign["start"]), self.state.tip
        start_steps, tip_steps = int(self.state.campaign["steps"]), (
            self.state.removals[-1].steps if self.state.removals and self.state.removals[-1].new_tip == tip
            else self.plan.steps)
        if self.bank.tree(start) == self.bank.tree(tip):
            self.ledger.append("audited", Closing(self.plan.audit, tip))
            return
        if unsettled(self.state):
            self.observer.note("what did harm is out; the rest is asked again without it")
            self.ledger.append("audited", Closing(self.plan.audit, tip))
            return
        self.observer.phase("closing audit: the start against the tip")
        seeds = self.seeds(GAIN_SEED)[: self.site.config.judge.final_pairs]
        results = self.complete([need for seed in seeds for need in (
            Need("final", start, seed, start_steps), Need("final", tip, seed, tip_steps))])
        bad = {self.state.runs[r.id].audits for r in self.audited([r for r in results if not r.fault]) if r.fault}
        couples = [(seed, a, b) for seed, a, b in zip(seeds, results[::2], results[1::2], strict=True)
                   if not (a.fault or b.fault) and not {a.id, b.id} & bad and a.fingerprint == b.fingerprint]
        split = "final" if self.site.config.evaluate.tier == "sealed" else "val"
        pairs = tuple(Pair(seed, {split: self.bank.values(a)[split]}, {split: self.bank.values(b)[split]}, a.id, b.id)
                      for seed, a, b in couples)
        rule = Rule(self.judge.alpha, (len(seeds),), self.judge.floor, 0, self.judge.direction, split, None)
        shown = estimate(pairs, rule)
        gain = Gain(self.site.config.metric.name, split, shown.effect, shown.low, shown.high, pairs,
                    sum(p.incumbent[split] for p in pairs) / len(pairs),
                    sum(p.candidate[split] for p in pairs) / len(pairs)) if shown else None
        self.ledger.append("audited", Closing(self.plan.audit, tip, gain, sooner([(a, b) for _, a, b in couples])))
        forget_weights(self.site, [r for r in self.state.runs.values() if r.seed >= ALONE_SEED])

    # ------------------------------------------------------------------------------------------------- small things

    def seeds(self, first: int) -> list[int]:
        """Seeds of this audit, of one kind."""
        first += APART * (self.plan.audit - 1)
        return list(range(first, first + APART))

    def tip_seeds(self, first: int, count: int) -> list[int]:
        """The first ``count`` seeds on which the tip itself runs. Raises UserError when it fails on half or more."""
        good: list[int] = []
        for tried, seed in enumerate(self.seeds(first)):
            if len(good) == count:
                break
            if tried >= 2 * count:
                raise UserError("The tip fails on half of its seeds, so nothing can be compared with it.",
                                "`ratchet log` and the job folders say why.")
            ahead = self.seeds(first)[tried: tried + count - len(good)]
            results = self.complete([Need("ablation", self.plan.tip, one, self.plan.steps) for one in ahead])
            good += [seed] if not results[0].fault else []
        return good

    def audited(self, results: list[Result]) -> list[Result]:
        """Audits of these runs in the sealed tier; none elsewhere."""
        if not audits.wanted(self.site.config):
            return []
        return self.complete([self.needs.audit(result) for result in {r.id: r for r in results}.values()])

    def complete(self, needs: list[Need]) -> list[Result]:
        """The results of ``needs``, run where they are not known; in the order asked. Raises UserError when the disk
        is full or the machine failed a run three times."""
        while True:
            missing = [need for need in needs if self.needs.known(need) is None]
            if not missing:
                return [found for need in needs if (found := self.needs.known(need)) is not None]
            for need in missing:
                device = self.slots.free(self.needs.device_for(need.seed))
                if device and not self.needs.on_its_way(need):
                    self.needs.start(need, device, None)
            for run_, result in self.slots.wait(0.5):
                self.absorb(run_, result)
            self.observer.jobs([(f"{run_.purpose} {run_.tree[:7]} seed {run_.seed}", progress)
                                for run_, progress in self.slots.progress()])

    def absorb(self, run_: Run, result: Result) -> None:
        full = result.fault and shutil.disk_usage(self.site.folder).free < 1 << 18
        self.ledger.append("run_finished", dataclasses.replace(result, fault="infra") if full else result)
        if full:
            raise UserError(f"The disk is full at {self.site.folder}.",
                            "Free some (`ratchet gc` frees old runs), then run the same command again.")
        if result.fault == "infra" and self.bank.tries(run_) >= INFRA_TRIES:
            raise UserError(f"The machine failed {INFRA_TRIES} times to run {run_.id}: {result.message}.",
                            f"Read {self.site.folder / run_.folder / 'supervisor.log'}, and see `ratchet doctor`.")

    def title(self, commit: str) -> str:
        return next((one.title for one in self.plan.commits if one.commit == commit), commit[:12])


def dry(folder: Path, pairs: int | None) -> tuple[Plan, int, State]:
    """(plan, runs at most, state) of what an audit would do now. Writes nothing to the ledger. Raises UserError."""
    state, _ = replay(folder / "ledger.jsonl")
    if runs.held(folder):
        raise UserError(f"Run {folder.name} is in use by another ratchet.", "Wait until it ends.")
    check_finished(state, folder)
    config = Config.model_validate(state.campaign["config"])
    begun = len(state.plans) > len(state.closings)
    drawn = state.plans[-1] if begun else plan(state, folder / "repo.git", config, _pairs(state, pairs))
    done = closed(state, folder / "repo.git")
    return drawn, 0 if done else runs_at_most(drawn, config.judge.final_pairs), state
