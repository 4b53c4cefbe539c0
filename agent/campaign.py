"""The night, in one file: read -> propose -> patch -> preflight -> measure -> judge -> merge, until nothing is left.

    resume      what an earlier process left open
    baseline    the incumbent must train
    loop        fill the free slots; wait for a job; absorb its result
    gain        start against tip, fresh seeds, the sealed final split

A Trial is a candidate on its way. Slots go first to the trials that are nearest to a verdict. Ideas that cost nothing
are drawn when a slot has nothing else to do; a model is asked ahead of that, in threads (drafts.py), and its
candidates pass their tiny run beside the training where cores are idle, so that no slot waits for a reply. When a
trial is merged, the others are built again on the new tip and start over, so that what is merged is always the tree
that was measured against the tip it is merged on.

Runs are named by what they are (tree, seed, steps), so the incumbent's runs form a bank by themselves: those of a
merged candidate are the bank of the new tip, and a resumed campaign finds what was already paid for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

from agent import audits, gain, git, guards, merge, recovery, report, runs
from agent.bank import Bank
from agent.bundles import Bundles
from agent.config import Config
from agent.court import Conclusion, Court, Trial
from agent.drafts import Refusal
from agent.errors import UserError
from agent.forecast import Forecaster
from agent.hooks import Hooks
from agent.intake import Intake
from agent.judge import estimate, rule_of
from agent.ledger import Attempt, Clock, State, replay, utc_now
from agent.measure import Slots, forget_weights, idle_cores
from agent.needs import Need, Needs
from agent.opening import Opened, Options, choose_folder, moved_branch, open_campaign
from agent.patch import combine
from agent.policy import PatchRefused
from agent.preflight import preflight
from agent.records import (
    Candidate,
    Fault,
    Guard,
    Merge,
    Pair,
    Proposal,
    Removal,
    Result,
    Revert,
    Run,
    Stage,
    Tier,
    Verdict,
)
from agent.show import phases
from agent.show.nightlog import Logged
from agent.show.screen import Observer
from agent.single import Single
from agent.spending import Spending, lost
from agent.steering import Steering
from sandbox import gpu

__all__ = ["Campaign", "Options", "run"]

class Trust(TypedDict):
    """Two fields of a Verdict."""

    tier: Tier
    level: int | None


TICK_SECONDS = 0.5
INFRA_TRIES = 3
"""Times a run is started before the machine, not the code, is blamed for good."""
FULL_BYTES = 1 << 18
"""A run that fails with less than this left on the disk proves nothing against the code."""


def run(options: Options, observer: Observer, clock: Clock = utc_now) -> int:
    """Run a campaign to its end or until it is interrupted. Returns the exit code. Raises UserError."""
    folder, continued = choose_folder(options, clock)
    folder.mkdir(parents=True, exist_ok=True)
    log = observer = Logged(observer, folder)
    with contextlib.closing(log), runs.lock(folder):
        try:
            opened = open_campaign(options, folder.resolve(), continued, observer, clock)
        except BaseException:
            if not replay(folder / "ledger.jsonl")[1]:
                shutil.rmtree(folder)  # nothing was measured yet: leave no half-made run behind
            raise
        campaign = Campaign(opened, observer, clock)
        try:
            campaign.night()
        except KeyboardInterrupt:
            campaign.stop()
            raise
        finally:
            campaign.slots.stop(campaign.slots.busy)  # whatever ended the night: no job outlives it
            if (error := sys.exception()) is not None:
                log.failed(error)
            campaign.hooks.end(error)
            opened.close()
    return 0


class Campaign:
    """One campaign. All memory is the ledger's; what is kept here can be rebuilt from it."""

    intake: Intake

    def __init__(self, opened: Opened, observer: Observer, clock: Clock) -> None:
        self.site, self.ledger, self.proposer = opened.site, opened.ledger, opened.proposer
        self.observer, self.clock = observer, clock
        self.bank = Bank(self.site, self.state)
        self.spending = Spending(self.site, self.state, opened.budget_runs, opened.until,
                                 lambda: self.intake.drafts.pending)
        config = self.site.config
        self.trials: list[Trial] = []
        self.intake = Intake(self, self.proposer, opened.news)
        self.slots = Slots(self.site, opened.engine, None if self.intake.drafts.inline else idle_cores(self.site))
        self.needs = Needs(self.site, self.ledger, self.bank, self.slots)
        self.steering = Steering(self)
        self.forecaster, self.hooks = Forecaster(self), Hooks(config.hooks, self)
        self.chores: list[Callable[[], None]] = []
        """Tidying that can wait until the slots have work again. All of it may be done twice: ``resume`` does what a
        killed process left undone."""
        self.rule = rule_of(config.judge, config.metric.direction, config.evaluate.tier == "sealed")
        self.court: Court = Bundles(self) if self.state.campaign.get("policy") == "bundles" else Single(self)

    @property
    def state(self) -> State:
        return self.ledger.state

    # ------------------------------------------------------------------------------------------------- the night

    def night(self) -> None:
        """The order of the night."""
        self.resume()
        self.tick(resting_only=True)
        if not self.intake.drafts.inline:
            self.intake.ask_ahead()
        self.baseline()
        self.observer.phase("trying proposals")
        while True:
            self.tick()
            drawn = self.fill()
            self.tidy()
            resting = self.slots.rests.any and bool(self.trials)
            if not (drawn or self.slots.busy or self.intake.awaited() or self.court.pending() or self.steering.holds()
                    or resting):
                break
            self.absorb(self.slots.wait(0 if drawn else TICK_SECONDS))
            self.intake.receive()
        self.give_up_rest()
        self.tidy()
        gain.measure(self)
        self.ledger.append("finished", {"phases": phases.facts(self.state)})
        try:
            report.write(self.state, self.site.folder)
        except OSError as error:  # the same command would begin the next campaign
            raise UserError(f"The campaign is finished, but its report cannot be written ({error.strerror}).",
                            f"Free some of the disk, then: ratchet report {self.state.campaign['name']}") from error
        self.observer.finished(self.state)

    def tick(self, resting_only: bool = False) -> None:
        """What is looked at again and again: orders, forecasts that are due, news for the owner's hooks."""
        self.steering.obey(resting_only)
        self.forecaster.look(self.clock())
        self.hooks.look()

    def stop(self) -> None:
        """End the running jobs and say in the ledger that the night was stopped, not lost."""
        self.slots.stop(self.state.open_runs)  # more than the busy ones, if the signal came while one was started
        waited = 0.0
        while self.slots.busy and waited < 20:
            for _, result in self.slots.wait(1.0):
                self.ledger.append("run_finished", result)
            waited += 1.0
        lost(self.ledger, self.intake.drafts.pending)
        self.ledger.append("stopped", {"reason": self.steering.reason, "phases": phases.facts(self.state)})

    def resume(self) -> None:
        """Finish what an earlier process began: a merge, live jobs, candidates without a verdict."""
        pending = self.state.pending_merge
        if pending is not None:
            self.move_branch(pending)
            self.ledger.append("merge", pending)
        undone = self.state.pending_revert
        if undone is not None:
            self.move_branch(undone)
            self.ledger.append("revert", undone)
            self.court.moved()
        ended = [(run_, result) for run_ in self.state.open_runs if (result := self.slots.attach(run_)) is not None]
        refs = git.refs(self.site.repo)
        for attempt in list(self.state.attempts.values()):
            self.end(attempt, refs)
        self.tidy()
        for attempt in list(self.state.attempts.values()):
            if attempt.verdict is None:
                self.retry(attempt)
        for trial in [trial for trial in self.trials if not trial.ready]:
            if (known := recovery.tiny_run(trial, self.state)) is not None:
                self.absorb_preflight(trial, *known)
        self.court.consider()
        self.absorb(ended)

    def end(self, attempt: Attempt, refs: set[str]) -> None:
        """What a verdict asks for, where the earlier process died between the two. ``refs``: those that there are."""
        candidate, verdict = attempt.candidate, attempt.verdict
        if candidate is None or verdict is None or attempt.merge is not None or verdict.unit:
            return
        if verdict.outcome == "accepted":
            self.accept(attempt, candidate, verdict)
        elif merge.REFUSED + candidate.id not in refs or f"refs/heads/{candidate.branch}" in refs:
            self.refuse(attempt, candidate, verdict)

    def retry(self, attempt: Attempt) -> None:
        """Take up an attempt that has no verdict yet, on the present tip."""
        candidate = attempt.candidate
        if candidate is not None and candidate.base == self.state.tip:
            begun = attempt.proposal.parts or any(run_.candidate == candidate.id for run_ in self.state.runs.values())
            if not begun and self.intake.turned_away(attempt, candidate):  # the process may have died between the two
                return
            trial = Trial(attempt, candidate)
            self.trials.append(trial)
            if not probed(self.site.config) or (attempt.preflight is not None and attempt.preflight.ok):
                trial.ready = True
                self.court.restore(trial)
        else:
            self.intake.build(attempt)

    def baseline(self) -> None:
        """Train the incumbent on the first seeds, as many as there are slots. Raises UserError when it fails."""
        count = min(len(self.site.devices), self.spending.budget_runs or max(self.rule.looks), max(self.rule.looks))
        seeds = self.court.first_seeds(count)
        self.observer.phase("training the incumbent")
        results = self.complete([Need("baseline", self.state.tip, seed, self.bank.tip_steps) for seed in seeds])
        for result in results:  # known to fail since the night before
            if not self.state.merges:
                self.check_incumbent(self.state.runs[result.id], result)
        if not self.state.merges:
            self.calibrate_audits(results[0])
        for blind in guards.unseen(self.site.config.guards, self.bank.at_start()):
            raise UserError(f"guards.{blind} is set, and no run of this target shows its {blind} from outside.",
                            "Take it out of ratchet.toml: such a cap would never refuse anything.")
        values = [score.value for result in results for name, score in result.scores.items() if name == "val"]
        self.ledger.append("baseline", {"values": values, "seconds": [r.seconds for r in results]})
        self.observer.note(f"incumbent: {self.site.config.metric.name} "
                           + ", ".join(f"{value:.4f}" for value in values)
                           + f"; {results[0].seconds:.0f} s a run, {len(self.site.devices)} side by side, "
                           f"isolation level {results[0].level}")

    def calibrate_audits(self, result: Result) -> None:
        """Audit the incumbent's first run: how far its own answers differ is what others are allowed to.

        Raises UserError when it is no arithmetic that makes them differ.
        """
        if not audits.wanted(self.site.config) or result.fault:
            return
        found = self.complete([self.needs.audit(result)])[0]
        if found.fault:
            raise UserError(f"The target's own model cannot be audited ({found.fault}): {found.message}.",
                            "Make it causal and deterministic, or set evaluate.audit = 0: then nothing stops a patch "
                            "whose model looks ahead.")

    def give_up_rest(self) -> None:
        """What the budget left without a verdict."""
        cap = self.spending.reached(self.clock()) or self.spending.questions_spent
        if cap:
            self.observer.note(f"the night ends at its cap: {cap}")
        for trial in list(self.trials):
            spent = self.spending.forbids("pair", self.clock())
            self.close(trial.attempt, "judge", "the budget was spent before it could be judged" if spent else
                       "not likely enough to be shown better to certify it", "inconclusive", pairs=tuple(trial.pairs))
            self.trials.remove(trial)
        for attempt in list(self.state.attempts.values()):
            if attempt.verdict is None:
                self.close(attempt, "propose", "the budget was spent before it was mended", "inconclusive")
        self.intake.give_up()

    # ----------------------------------------------------------------------------------------------- fill the slots

    def fill(self) -> bool:
        """Give every free slot something to do, and ask for what will be needed next. True when an idea was drawn at
        once, so that there may be more to do at once.

        One such idea at a time: what ended jobs show may free or fill the slots.
        """
        if self.steering.resting:
            return False
        while self.start_wanted():
            pass
        if not self.court.draws():
            return False
        if self.intake.drafts.inline:
            return self.slots.free() is not None and self.intake.draw()
        self.intake.ask_ahead()
        return False

    def tidy(self) -> None:
        """Do the chores."""
        while self.chores:
            self.chores.pop(0)()

    def start_wanted(self) -> bool:
        """Start one run that a trial waits for; nearest to a verdict first, tiny runs last."""
        for need, owner in (*self.court.wants(), *self.probes()):
            device = self.needs.device_for(need.seed) if need.purpose != "preflight" else ""
            free = self.slots.free(device, need.purpose in ("preflight", "audit"))
            if free and not self.spending.forbids(need.purpose, self.clock()):
                if need.purpose == "pair":
                    self.intake.begin()
                self.needs.start(need, free, owner)
                return True
        return False

    def probes(self) -> Iterator[tuple[Need, str]]:
        """The tiny runs that trials wait for."""
        first, steps = self.site.config.seeds.first, self.site.config.budget.probe_steps
        for trial in sorted(self.trials, key=lambda t: t.attempt.number):
            if not trial.ready and not any(run_.candidate == trial.id for run_ in self.slots.busy):
                yield Need("preflight", trial.candidate.head, first, steps), trial.id

    def admit(self, trial: Trial) -> None:
        """A new trial, which wants its tiny run first where the target has one."""
        self.trials.append(trial)
        if not probed(self.site.config):
            self.enter(trial)

    def enter(self, trial: Trial) -> None:
        """A trial is fit for full runs."""
        trial.ready = True
        self.court.enter(trial)

    def bundle(self, parts: Sequence[Attempt], proposal: Proposal) -> Trial | None:
        """A new attempt made of others that stand on the tip; None where their patches do not fit together."""
        try:
            candidate = combine(self.site.repo, self.site.prefix, self.state.tip, proposal,
                                [part.proposal for part in parts], self.site.config.source, self.clock())
        except PatchRefused as refused:
            self.note(f"{proposal.id} cannot be built: {refused}")
            return None
        self.ledger.append("proposal", proposal)
        self.ledger.append("candidate", candidate)
        trial = Trial(self.state.attempts[proposal.id], candidate)
        self.admit(trial)
        return trial

    def more(self) -> bool:
        """Whether there may be more proposals."""
        return self.intake.more()

    # ------------------------------------------------------------------------------------------- absorb the results

    def absorb(self, ended: list[tuple[Run, Result]]) -> None:
        """Record what ended, then take every decision that it allows."""
        while self.slots.rests.notes:
            self.note(self.slots.rests.notes.pop(0))
        for run_, result in ended:
            if result.fault and shutil.disk_usage(self.site.folder).free < FULL_BYTES:
                self.ledger.append("run_finished", dataclasses.replace(result, fault="infra"))
                raise UserError(f"The disk is full at {self.site.folder}.",
                                "Free some (`ratchet gc` frees old runs), then run the same command again.")
            self.ledger.append("run_finished", result)
            trial = next((t for t in self.trials if t.id == run_.candidate), None)
            twin = self.intake.novelty.same_as(run_, result)
            if trial is not None and twin and run_.tree == trial.candidate.tree:
                self.close(trial.attempt, "preflight" if run_.purpose == "preflight" else "measure",
                           f"behaves exactly as {twin}: the same {'weights' if result.weights_sha256 else 'losses'} on "
                           f"seed {run_.seed}", pairs=tuple(trial.pairs))
                self.drop(trial)
                self.court.leave(trial)
            elif run_.purpose == "preflight" and trial is not None:
                self.absorb_preflight(trial, run_, result)
            elif run_.candidate is None:
                self.check_incumbent(run_, result)
            if trial is not None and trial in self.trials and self.bank.tries(run_) >= INFRA_TRIES and (
                    result.fault == "infra"):
                self.close(trial.attempt, "measure", f"the machine failed {INFRA_TRIES} times: {result.message}",
                           "inconclusive", "infra", tuple(trial.pairs))
                self.drop(trial)
                self.court.leave(trial)
        if ended:
            self.court.consider()
        self.observer.jobs([(self.label(run_), progress) for run_, progress in self.slots.progress()])

    def absorb_preflight(self, trial: Trial, run_: Run, result: Result) -> None:
        """Pass, refuse or repair a candidate on its tiny run."""
        if result.fault == "infra" or run_.tree != trial.candidate.tree:
            return
        found = preflight(trial.id, result, self.site.config.budget, self.bank.tip_steps)
        if found.ok:  # counts are known already; nothing else of a tiny run compares with a full one
            known = guards.weigh(self.bank.at_start(), (), [(result, result)])
            over = guards.complaint(self.site.config.guards, {name: known[name] for name in guards.EXACT
                                                              if name in known})
            found = dataclasses.replace(found, ok=not over, reason=over or found.reason,
                                        steps=0 if over else found.steps)
        self.ledger.append("preflight", found)
        if found.ok:
            self.enter(trial)
            return
        self.trials.remove(trial)
        self.court.leave(trial)
        refusal = Refusal("preflight", found.reason, found.fault)
        if found.fault and not trial.attempt.proposal.parts:
            self.intake.note_reply(self.state.attempts[trial.id], "preflight", found.reason)
            problem = f"{found.reason}\n{found.log_tail[-2000:]}"
            self.intake.mend(self.state.attempts[trial.id], problem, trial.repairs, refusal)
        else:
            self.close(trial.attempt, refusal.stage, refusal.reason)

    def conclude(self, trial: Trial, found: Conclusion) -> None:
        """Write the verdict; merge and build the others again on the new tip, or keep the refused one."""
        if self.steering.withhold(trial, found):
            return
        self.drop(trial)
        verdict = Verdict(trial.id, found.outcome, found.stage, found.reason, found.fault, found.estimate,
                          tuple(trial.pairs), found.evidence, **self.trust(trial.attempt),
                          guards=self.guarded(tuple(trial.pairs)), unit=found.unit)
        self.ledger.append("verdict", verdict)
        attempt = self.state.attempts[trial.id]
        if found.outcome == "accepted" and not found.unit:
            self.accept(attempt, trial.candidate, verdict)
        elif found.outcome == "accepted":
            self.chores.append(lambda: forget_weights(self.site, attempt.runs))
        else:
            self.refuse(attempt, trial.candidate, verdict)
        self.observer.attempt(self.state, attempt)

    def refuse(self, attempt: Attempt, candidate: Candidate, verdict: Verdict) -> None:
        """Keep a refused candidate as a ref that says why."""
        def keep() -> None:
            merge.refuse(self.site.repo, candidate, attempt.proposal, verdict, self.site.folder.name, self.clock())
            forget_weights(self.site, attempt.runs)

        self.chores.append(keep)

    def accept(self, attempt: Attempt, candidate: Candidate, verdict: Verdict) -> None:
        """Intent, compare-and-swap, outcome; then the other trials start over on the new tip."""
        prepared = merge.prepare_merge(self.site.repo, candidate, attempt.proposal, verdict, self.state.tip,
                                       self.conditions(attempt, verdict), self.clock())
        self.ledger.append("merge_intent", prepared)
        self.move_branch(prepared)
        self.ledger.append("merge", prepared)
        forget_weights(self.site, attempt.runs)
        self.start_over()

    def start_over(self) -> None:
        """Build the other trials again, on the new tip."""
        others, self.trials = [*self.trials, *self.steering.release()], []
        for other in others:
            if self.court.restarts:
                self.slots.stop([run_ for run_ in self.slots.busy if run_.candidate == other.id])
            self.intake.build(self.state.attempts[other.id], other.repairs)
        self.court.moved()

    def move_branch(self, merged: Merge | Removal | Revert) -> None:
        """The compare-and-swap of a merge. Raises UserError when somebody moved the branch meanwhile."""
        try:
            merge.complete_merge(self.site.repo, merged)
        except git.RefMoved:
            elsewhere = moved_branch(self.state, self.site.repo)
            if elsewhere is None:
                raise
            raise elsewhere from None

    def check_incumbent(self, run_: Run, result: Result) -> None:
        """The incumbent must train: the machine gets three tries, the code one. Raises UserError.

        A merged tip trained on every seed that it was judged on; one on which it fails later is passed over.
        """
        place = self.site.folder / run_.folder
        if result.fault == "infra" and self.bank.tries(run_) >= INFRA_TRIES:
            raise UserError(f"The machine failed {INFRA_TRIES} times to run the target: {result.message}.",
                            f"Read {place / 'supervisor.log'}, and see `ratchet doctor`.")
        if result.fault and result.fault != "infra" and run_.purpose == "baseline":
            if self.state.merges or len(self.bank.at_start()) > len(self.bank.failed(self.state.tip)):
                self.note(f"the tip failed on seed {run_.seed} ({result.fault}: {result.message}): it is left out")
                return
            raise UserError(f"The target itself fails to train ({result.fault}): {result.message}.",
                            f"Read {place / 'log.txt'}, mend it, commit, and run again.")

    # ------------------------------------------------------------------------------------------------ small facts

    def steps_of(self, trial: Trial) -> int:
        passed = self.state.attempts[trial.id].preflight
        return trial.recharged or (passed.steps if passed else self.bank.tip_steps)

    def complete(self, needs: list[Need], late: Callable[[], bool] = lambda: False) -> list[Result]:
        """The results of ``needs``, run where they are not known; in the order asked. Once it is ``late``, of those
        alone that have begun."""
        while True:
            missing = [need for need in needs if self.needs.known(need) is None]
            over = late()
            if not missing or (over and not self.slots.busy):
                return [found for need in needs if (found := self.needs.known(need)) is not None]
            for need in missing if not over else ():
                device = self.slots.free(self.needs.device_for(need.seed))
                if device and not self.steering.resting and not self.needs.on_its_way(need):
                    self.needs.start(need, device, None)
            self.tick(resting_only=True)
            self.absorb(self.slots.wait(TICK_SECONDS))

    def drop(self, trial: Trial) -> None:
        """Take a trial off the slots."""
        if trial in self.trials:
            self.trials.remove(trial)
        self.slots.stop([run_ for run_ in self.slots.busy if run_.candidate == trial.id])

    def close(self, attempt: Attempt, stage: Stage, reason: str, outcome: str = "rejected",
              fault: Fault | None = None, pairs: tuple[Pair, ...] = ()) -> None:
        """A verdict from a stage other than the judge."""
        verdict = Verdict(attempt.proposal.id, "inconclusive" if outcome == "inconclusive" else "rejected", stage,
                          reason, fault, estimate(pairs, self.rule), pairs, **self.trust(attempt),
                          guards=self.guarded(pairs))
        self.ledger.append("verdict", verdict)
        current = self.state.attempts[attempt.proposal.id]
        if current.candidate is not None:
            self.refuse(current, current.candidate, verdict)
        self.observer.attempt(self.state, current)
        if stage in ("propose", "patch") and attempt.proposal.author == "llm" and outcome == "rejected":
            self.intake.came_to_nothing()

    def guarded(self, pairs: tuple[Pair, ...]) -> dict[str, Guard]:
        """What a candidate with these pairs costs beside the loss, against the start of the campaign."""
        def runs_of(some: tuple[Pair, ...]) -> list[tuple[Result, Result]]:
            known = self.state.results
            return [(known[p.incumbent_run], known[p.candidate_run]) for p in some if not p.fault]

        done = [self.state.attempts[merged.candidate].verdict for merged in self.state.kept]
        return guards.weigh(self.bank.at_start(), [runs_of(verdict.pairs) for verdict in done if verdict],
                            runs_of(pairs))

    def trust(self, attempt: Attempt) -> Trust:
        """How far the numbers of an attempt can be trusted: their tier, and the lowest level of its runs."""
        results = [self.state.results[r.id] for r in attempt.runs if r.id in self.state.results]
        levels = [result.level for result in results if result.fault != "infra"]  # a stopped one may have found none
        return {"tier": self.site.config.evaluate.tier, "level": min(levels, default=None)}

    def conditions(self, attempt: Attempt, verdict: Verdict) -> merge.Conditions:
        """Under what the candidate was measured, for its commit."""
        measured = [self.state.results[pair.candidate_run] for pair in verdict.pairs]
        spent = sum(self.state.results[r.id].seconds * gpu.count(r.device) for r in attempt.runs
                    if r.id in self.state.results)
        return merge.Conditions(
            self.site.config.metric.name, self.site.config.metric.direction,
            self.budget_text(self.state.runs[verdict.pairs[0].candidate_run].steps),
            measured[0].fingerprint.get("device", self.site.devices[0]), min(r.level for r in measured),
            self.site.config.evaluate.tier, spent, self.site.on_gpus,
            str(self.state.campaign["name"]))

    def budget_text(self, steps: int) -> str:
        budget = self.site.config.budget
        if budget.unit == "seconds" or not steps:
            return f"{budget.amount:g} seconds" if budget.amount else "what the command decides"
        return f"{steps} {budget.unit.replace('_', ' ')}"

    def note(self, text: str) -> None:
        """For the screen, the report and whoever reads the ledger."""
        self.ledger.append("note", {"text": text})
        self.observer.note(text)

    def label(self, run_: Run) -> str:
        who = run_.candidate or ("start or tip" if run_.purpose == "final" else "incumbent")
        what = {"preflight": "preflight", "audit": f"audit of seed {run_.seed}"}
        return f"{who} {what.get(run_.purpose, f'seed {run_.seed}')}"


def probed(config: Config) -> bool:
    """Whether a tiny run makes sense: a command that takes no number of steps would only run whole, twice."""
    return config.budget.probe_steps > 0 and (config.train.served or "{steps}" in config.train.command)

