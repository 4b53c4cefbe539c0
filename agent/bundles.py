"""Bundles: the gate of agent/gate on real trees.

    names    an attempt's id; with ``~2`` and so on after its patch was mended and it began anew
    arms     what the gate switches on: nothing (the tip), one candidate, or several merged into one tree
    asks     runs that the gate wants; each stays open until ``_answer`` can tell what came of it

The gate is a pure state machine, so what it was told and asked is all that need be kept: every call that changes it is
an event ``gate`` in the ledger, written before anything is done about it, and a resumed campaign makes the same calls
on a new gate. A bundle is an attempt of its own, whose proposal names its parts: it has a tiny run, runs, a verdict and
a merge like any other.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any, get_args

from agent import audits, calls, guards
from agent.court import Conclusion, Host, Trial, failed_seeds, overspent, recharge, recharged_before
from agent.errors import UserError
from agent.gate import Ask, Draw, Failed, Gate, Pause, Ruling
from agent.judge import estimate
from agent.ledger import Attempt
from agent.measure import forget_weights
from agent.needs import Need
from agent.patch import applied, chain
from agent.policy import PatchRefused
from agent.propose import proposal_id
from agent.records import Candidate, Certification, Fault, Pair, Proposal, Result
from agent.show.view import clean

MACHINE_TRIES = 3
"""Starts of a run of several candidates that the machine may fail before the run counts as failed."""


class Bundles:
    """See court.py for the public methods."""

    restarts = False

    def __init__(self, host: Host) -> None:
        self._host = host
        self._gate = Gate(calls.settings_of(host.state.campaign))
        self._tips = [host.site.start]
        self._open: dict[int, Ask] = {}
        self._told: list[tuple[Ask, str]] = []
        """Answered asks that had an arm, each with the id of its run."""
        self._found: list[Ruling | Failed] = []
        """Said by the gate and not yet acted upon."""
        self._changed = self._draws = self._moved = False
        self._names: dict[str, str] = {}
        """The gate's name of each attempt that it knows."""
        self._gone: set[str] = set()
        """Names that were taken out of the gate without a ruling that counts."""
        self._entered: set[tuple[str, str]] = set()
        """(attempt, base) of trials that may run."""
        for call in host.state.calls:
            self._take(call)
        # the process may have died between a move of the tip and the call that tells of it
        self._moved = bool(host.state.calls) and self._tips[-1] != host.state.tip

    # ------------------------------------------------------------------------------------------ what the campaign calls

    def first_seeds(self, count: int) -> list[int]:
        first = self._host.site.config.seeds.first
        return failed_seeds(self._host, list(range(first, first + count + 8)), count)

    def enter(self, trial: Trial) -> None:
        self._entered.add((trial.id, trial.candidate.base))
        known = self._names.get(trial.id)
        if trial.attempt.proposal.parts or (known and known not in self._gone):
            return
        again = int(known.partition("~")[2] or 1) + 1 if known else 1
        name = trial.id if again == 1 else f"{trial.id}~{again}"
        clashes = [other for other in self._gate.live if self._clash(trial.candidate, other)]
        self._call({"admit": name, "clashes": clashes})

    def leave(self, trial: Trial) -> None:
        name = self._names.get(trial.id)
        if name in self._gate.live:
            self._call({"withdraw": name})

    def restore(self, trial: Trial) -> None:
        recharged_before(trial)
        self.enter(trial)

    def wants(self) -> Iterator[tuple[Need, str | None]]:
        self.consider()
        for ask in list(self._open.values()):
            missing = self._missing(ask)
            if missing and not self._host.needs.on_its_way(missing[0]):
                yield missing

    def consider(self) -> None:
        while True:
            if self._moved:
                self._tell_moved()
            for ask in list(self._open.values()):
                self._answer(ask)
            found, self._found = self._found, []
            for ruling in sorted(found, key=lambda one: isinstance(one, Ruling) and one.outcome == "accepted"):
                self._act(ruling)
            if self._moved:
                continue
            slots = self._room()
            if not self._changed and not slots:
                return
            before = len(self._open)
            self._next(slots)
            if not self._changed and not self._found and len(self._open) == before:
                return

    def draws(self) -> bool:
        self.consider()
        return self._draws

    def pending(self) -> bool:
        self.consider()
        return bool(self._open) and not self._host.spending.forbids("pair", self._host.clock())

    def moved(self) -> None:
        """Told later, once the trials of a resumed campaign are there again."""
        self._moved = True

    # ------------------------------------------------------------------------------------------------ calls on the gate

    def _call(self, call: dict[str, Any]) -> None:
        """Write a call, then make it."""
        self._host.ledger.append("gate", call)
        self._take(call)

    def _take(self, call: dict[str, Any]) -> None:
        """Make a call that the ledger holds, and keep what the host must know of it."""
        self._changed = True
        if "withdraw" in call:
            self._gone.add(call["withdraw"])
        elif "moved" in call:
            self._gone |= set(self._gate.live) - set(call["moved"])
        said = calls.make(self._gate, call)
        if "next" in call:
            self._heard(said)
        elif "admit" in call:
            self._names[str(call["admit"]).split("~")[0]] = str(call["admit"])
        elif "told" in call:
            ask = self._open.pop(call["told"])
            if ask.arm:
                self._told.append((ask, str(call.get("run", ""))))
        elif "moved" in call:
            self._tips.append(call["tip"])
            self._found = [one for one in self._found if not (isinstance(one, Ruling) and one.outcome == "accepted")]

    def _next(self, slots: int) -> None:
        """Ask the gate; what changes it is written before it is acted upon."""
        left, more = self._left(), self._host.more()
        said = self._gate.next(slots, more, left)
        asks = [step.id for step in said if isinstance(step, Ask)]
        if self._changed or any(not isinstance(step, Draw) for step in said):
            self._host.ledger.append("gate", {"next": [slots, more, left], "asks": asks})
        self._changed = False
        self._heard(said)
        paused = next((step for step in said if isinstance(step, Pause)), None)
        if paused:
            self._call({"resume": paused.reason})  # before the error: the next start goes on
            raise UserError(f"The campaign is paused: {paused.reason}.", "`ratchet status` shows the runs that failed; "
                            "once that is mended, the same command goes on.")

    def _heard(self, said: list[calls.Said]) -> None:
        self._changed = False
        self._draws = any(isinstance(step, Draw) for step in said)
        self._open |= {step.id: step for step in said if isinstance(step, Ask)}
        self._found += [step for step in said if isinstance(step, (Ruling, Failed))]

    def _room(self) -> int:
        """Slots that no ask is waiting for."""
        waiting = sum(not self._on_its_way(ask) for ask in self._open.values())
        return max(0, self._host.slots.idle - waiting)

    def _on_its_way(self, ask: Ask) -> bool:
        missing = self._missing(ask)
        return missing is not None and self._host.needs.on_its_way(missing[0])

    def _left(self) -> int | None:
        """Runs that may still be started; None where nothing limits them."""
        return self._host.spending.left(self._host.clock())

    # --------------------------------------------------------------------------------------------------- asks and trees

    def _missing(self, ask: Ask) -> tuple[Need, str | None] | None:
        """The next thing that must be known before an ask can be answered."""
        return next((one for one in self._needs(ask) if self._host.needs.known(one[0]) is None), None)

    def _needs(self, ask: Ask) -> list[tuple[Need, str | None]]:
        """What must be known before an ask can be answered, in this order; nothing where its tree may not run yet."""
        host, tip = self._host, self._tips[ask.tip]
        if not ask.arm:
            steps = host.bank.tip_steps if tip == host.state.tip else self._steps_at(ask.tip)
            return [(Need("baseline", tip, ask.seed, steps), None)]
        if ask.stage == "weigh":
            commit = self._row(ask)
            return [(Need("weigh", commit, ask.seed, self._row_steps(ask)), None)] if commit else []
        trial = self._trial(ask)
        if trial is None:
            return []
        built = trial.candidate
        run = Need("pair", built.head, ask.seed, host.steps_of(trial),
                   patch=built.patch if ask.stage == "screen" else None)
        before = [(host.needs.audit(found), trial.id) for found in self._first_run(ask, trial)]
        result = host.needs.known(run)
        after = [(host.needs.audit(result), trial.id)] if result and self._audited(ask, trial, result) else []
        return [*before, (run, trial.id), *after]

    def _trial(self, ask: Ask) -> Trial | None:
        """The trial that an ask is about, once it may run; of a bundle it is made here. None also when it has ended."""
        host, base = self._host, self._tips[ask.tip]
        if len(ask.arm) == 1:
            name = ask.arm[0].split("~")[0]
            trial = next((t for t in host.trials if t.id == name), None)
            if trial is not None and trial.candidate.base != base:  # built again on a newer tip
                old = host.state.builds.get((name, base))
                check = host.state.checks.get((name, base))
                return Trial(trial.attempt, old, ready=True, recharged=check.steps if check else 0) if old else None
        else:
            trial = self._bundle(ask)
        if trial is None or (trial.id, base) not in self._entered:
            return None
        if ask.stage == "certify":
            self._note_start(trial)
        return trial

    def _bundle(self, ask: Ask) -> Trial | None:
        """The trial of a bundle: made when its first run is asked for."""
        host, base = self._host, self._tips[ask.tip]
        ids = tuple(name.split("~")[0] for name in ask.arm)
        known = self._bundle_of(ids, base)
        if known is not None:
            return next((t for t in host.trials if t.id == known.proposal.id), None)
        if base != host.state.tip:
            return None
        parts = [host.state.attempts[name] for name in ids]
        title = f"{len(parts)} changes: " + "; ".join(clean(part.proposal.title) for part in parts)
        about = ["Certified together, not one by one. What selection expected of each:"]
        about += [f"{clean(part.proposal.title)} ({part.proposal.id})." for part in parts]
        proposal = Proposal(proposal_id(len(host.state.attempts) + 1, f"bundle of {len(parts)}"), base, title,
                            "\n\n".join(about), "gate", parts=ids)
        trial = host.bundle(parts, proposal)
        if trial is None:
            last = ask.arm[-1]  # patches may clash although no two of them do: the bundle is made anew without it
            part = next((t for t in host.trials if t.id == ids[-1]), None)
            self._call({"withdraw": last})
            if part is not None:
                why = "does not merge with the others of its bundle"
                host.conclude(part, Conclusion("inconclusive", why, None, {}))
        return trial

    def _bundle_of(self, ids: tuple[str, ...], base: str) -> Attempt | None:
        """The newest attempt that is this bundle on this tip and has no verdict, or was accepted."""
        return next((one for one in reversed(self._host.state.attempts.values())
                     if one.proposal.parts == ids and one.proposal.base == base
                     and (one.verdict is None or one.verdict.outcome == "accepted")), None)

    def _note_start(self, trial: Trial) -> None:
        """Write that a certification began, and all that its evidence depends on, before its first run."""
        proof, state = self._gate.proof, self._host.state
        if proof is None or any(known.hypothesis == proof.hypothesis for known in state.certifications):
            return
        self._host.ledger.append("certify", Certification(
            trial.id, trial.candidate.base, trial.candidate.tree, proof.hypothesis, proof.merges,
            self._host.steps_of(trial), proof.gear, proof.looks, proof.expected, proof.sd, proof.degrees, proof.floor))

    def _row(self, ask: Ask) -> str | None:
        """Commit of a row of a weighing design; None where its patches do not fit together."""
        site, state = self._host.site, self._host.state
        parts = [state.attempts[name.split("~")[0]].proposal for name in ask.arm]
        try:
            return chain(site.repo, site.prefix, self._tips[ask.tip], parts, site.config.source, _EPOCH)
        except PatchRefused:
            return None

    def _row_steps(self, ask: Ask) -> int:
        """Charged steps of a row: its parts' step costs multiply."""
        checks = [self._host.state.checks.get((name.split("~")[0], self._tips[ask.tip])) for name in ask.arm]
        steps, base = float(self._steps_at(ask.tip)), self._steps_at(ask.tip)
        for check in checks:
            steps *= check.steps / base if check and base and check.steps else 1.0
        return round(steps)

    def _steps_at(self, tip: int) -> int:
        """Steps of the incumbent's runs at a tip."""
        state, commit = self._host.state, self._tips[tip]
        if commit == state.tip:
            return self._host.bank.tip_steps
        done = next((one for one in state.merges if one.new_tip == commit), None)
        if done is None:
            return int(state.campaign["steps"])
        return next((run.steps for run in reversed(state.attempts[done.candidate].runs) if run.purpose == "pair"),
                    int(state.campaign["steps"]))

    def _clash(self, candidate: Candidate, other: str) -> bool:
        """Whether two patches cannot be in one tree."""
        site, state = self._host.site, self._host.state
        try:
            applied(site.repo, site.prefix, candidate.head, state.attempts[other.split("~")[0]].proposal,
                    site.config.source)
        except PatchRefused:
            return True
        return False

    # --------------------------------------------------------------------------------------------------- what came back

    def _answer(self, ask: Ask) -> None:
        """Tell the gate what came of an ask, if that is known."""
        host = self._host
        if self._stale(ask):
            self._call({"told": ask.id, "fault": "withdrawn"})
            return
        needs = self._needs(ask)
        missing = self._missing(ask)
        if not needs or missing:
            if ask.stage == "weigh" and (not needs or (missing and self._machine_failed(missing[0]))):
                self._call({"told": ask.id, "fault": "machine" if needs else "conflict"})
            return
        found = [(need, result) for need, _ in needs if (result := host.needs.known(need))]
        for need, result in found:
            if need.purpose == "audit" and result.fault:
                self._refuse(ask, needs[0][1], f"its audit failed: {result.message}", result.fault)
                return
        run = next(result for need, result in found if need.purpose != "audit")
        trial = self._trial(ask) if ask.arm and ask.stage != "weigh" else None
        if trial is not None and not run.fault and not self._fits(ask, trial):
            return
        split = host.rule.split if ask.stage == "certify" else host.rule.select
        told: dict[str, Any] = {"told": ask.id, "run": run.id}
        if run.fault:
            told["fault"] = run.fault
        else:
            value = host.bank.values(run)[split]
            told |= {"value": value if host.rule.direction == "min" else -value,
                     "audited": run.id in host.state.audited}
        self._call(told)
        if ask.stage == "weigh":
            forget_weights(host.site, [host.state.runs[run.id]])

    def _stale(self, ask: Ask) -> bool:
        """Whether nobody waits for the answer any more: the candidates were ruled on or taken out, or the
        certification is over."""
        if ask.stage == "certify":
            proof = self._gate.proof
            return proof is None or all(pair.seed != ask.seed for pair in proof.pairs)
        return ask.stage == "screen" and ask.arm[0] not in self._gate.live

    def _machine_failed(self, need: Need) -> bool:
        runs = self._host.bank.runs(self._host.bank.tree(need.commit), need.seed, need.steps)
        return bool(runs) and self._host.bank.tries(runs[-1]) >= MACHINE_TRIES

    def _fits(self, ask: Ask, trial: Trial) -> bool:
        """Whether a run cost what it may and its candidate keeps the owner's caps. False: it is repeated with fewer
        steps, or its candidate was refused."""
        host = self._host
        seeds = [one.seed for one, _ in self._told if one.arm == ask.arm and one.tip == ask.tip] + [ask.seed]
        found = overspent(host, trial, seeds) if trial in host.trials else None
        if found is not None:
            begun = any(one.arm == ask.arm and one.stage == "certify" for one, _ in self._told)
            if (ask.stage == "certify" and begun) or not recharge(host, trial, *found):
                self._refuse(ask, trial.id, f"it costs {found[0]:.1f} charged seconds where {found[1]:.1f} "
                             "are allowed", "timeout")
            return False
        pair = self._pair(ask, trial)
        over = guards.complaint(host.site.config.guards, host.guarded((pair,))) if pair else ""
        if over:
            self._refuse(ask, trial.id, over, None)
        return not over

    def _refuse(self, ask: Ask, owner: str | None, reason: str, fault: Fault | None) -> None:
        """Refuse a candidate on other grounds than its loss; a bundle fails its certification by it."""
        host = self._host
        trial = next((t for t in host.trials if t.id == owner), None)
        if trial is not None and not trial.attempt.proposal.parts:
            trial.pairs = self._pairs_of(trial)
            self._call({"withdraw": self._names[trial.id]})
            host.close(trial.attempt, "measure", reason, fault=fault, pairs=tuple(trial.pairs))
            host.drop(trial)
        self._call({"told": ask.id, "fault": fault or "refused"})

    def _first_run(self, ask: Ask, trial: Trial) -> list[Result]:
        """The candidate's first run, which is audited before it goes on to a second."""
        host = self._host
        if not audits.wanted(host.site.config) or trial not in host.trials:
            return []
        return [result for one, run in self._told if one.arm == ask.arm and one.tip == ask.tip
                and (result := host.state.results.get(run)) and not result.fault][:1]

    def _audited(self, ask: Ask, trial: Trial, result: Result) -> bool:
        """Whether a run must be audited before it counts: a certification's first, and its last before a look; of
        screening runs, one candidate's first in twenty."""
        host, proof = self._host, self._gate.proof
        if not audits.wanted(host.site.config) or result.fault:
            return False
        if ask.stage == "screen":
            return not self._first_run(ask, trial) and audits.drawn(result.id, str(host.state.campaign["start"]))
        place = next((n for n, pair in enumerate(proof.pairs, 1) if pair.seed == ask.seed), 0) if proof else 0
        return place == 1 or (proof is not None and place in proof.looks)

    # ------------------------------------------------------------------------------------------------------ conclusions

    def _act(self, found: Ruling | Failed) -> None:
        """Write what the gate ruled. May be done again: what is in the ledger is left alone."""
        host = self._host
        if isinstance(found, Failed):
            self._failed(found)
        elif found.outcome == "accepted":
            self._accept(found)
        else:
            trial = next((t for t in host.trials if t.id == found.unit[0].split("~")[0]), None)
            if trial is None or found.unit[0] in self._gone:
                return  # written before, or its patch is being mended
            trial.pairs = self._pairs_of(trial)
            fault = _fault(found.evidence.get("fault"))
            said = "".join(f" ({host.state.results[p.candidate_run].message})" for p in trial.pairs if p.fault)
            reason = found.reason if fault != "behind" else "its run was stopped early"
            host.conclude(trial, Conclusion(
                found.outcome, reason + said, estimate(trial.pairs, host.rule),
                calls.plain(found.evidence) | audits.evidence(trial.pairs, host.state), fault,
                "measure" if fault else "judge"))

    def _failed(self, found: Failed) -> None:
        """A bundle was not shown: its attempt ends, its parts are ruled on apart."""
        ids = tuple(name.split("~")[0] for name in found.unit)
        bundle = next((t for t in self._host.trials if t.attempt.proposal.parts == ids), None)
        if bundle is not None:
            host = self._host
            bundle.pairs = self._pairs_of(bundle)
            begun = any(pair.fresh for pair in bundle.pairs)
            told = calls.proven(host.state, bundle.attempt, bundle.pairs, host.rule)[2] if begun else {}
            host.conclude(bundle, Conclusion(
                "rejected" if found.evidence else "inconclusive", found.reason, estimate(bundle.pairs, host.rule),
                calls.plain(told) | audits.evidence(bundle.pairs, host.state)))

    def _accept(self, ruling: Ruling) -> None:
        """Parts first, then the bundle, whose merge moves the tip."""
        host = self._host
        ids = tuple(name.split("~")[0] for name in ruling.unit)
        base = self._tips[-1]
        attempt = host.state.attempts[ids[0]] if len(ids) == 1 else self._bundle_of(ids, base)
        assert attempt is not None, "a bundle was certified that was never built"
        if attempt.verdict is not None:
            self._moved = self._moved or attempt.merge is not None
            return
        trial = next(t for t in host.trials if t.id == attempt.proposal.id)
        trial.pairs = self._pairs_of(trial)
        passed, why, told = calls.proven(host.state, trial.attempt, trial.pairs, host.rule)
        if not passed:  # an audit of its last run moved a score by just what was needed
            self._call({"refused": attempt.proposal.id})
            for one in [t for t in host.trials if t.id in (*ids, trial.id)]:
                host.conclude(one, Conclusion("rejected", why, estimate(trial.pairs, host.rule), calls.plain(told)))
            return
        for part in [t for t in host.trials if t.id in ids and len(ids) > 1]:
            part.pairs = self._pairs_of(part)
            belief = {key: value for key, value in ruling.evidence.items() if key in ("gear", "hypothesis")}
            host.conclude(part, Conclusion("accepted", f"in {attempt.proposal.id}; not certified alone", None,
                                           calls.plain(belief), unit=attempt.proposal.id))
        host.conclude(trial, Conclusion("accepted", why, calls.estimated(told, host.rule),
                                        calls.plain(told) | audits.evidence(trial.pairs, host.state)))

    def _tell_moved(self) -> None:
        """The tip moved: the gate hears which candidates still stand."""
        self._moved = False
        live = {self._names[trial.id] for trial in self._host.trials if trial.id in self._names}
        self._call({"moved": [name for name in self._gate.live if name in live], "tip": self._host.state.tip})

    def _pairs_of(self, trial: Trial) -> list[Pair]:
        """Pairs of a trial on the present tip, from what the gate was told, the screening ones first."""
        names = tuple(self._names.get(part, part) for part in trial.attempt.proposal.parts) or (
            self._names.get(trial.id, trial.id),)
        asks = [ask for ask, _ in self._told if ask.arm == names and self._tips[ask.tip] == trial.candidate.base
                and ask.stage != "weigh"]
        found = [pair for ask in sorted(asks, key=lambda ask: (ask.stage == "certify", ask.id))
                 if (pair := self._pair(ask, trial))]
        return list({(pair.seed, pair.fresh): pair for pair in found}.values())

    def _pair(self, ask: Ask, trial: Trial) -> Pair | None:
        """The pair of an ask's run with the incumbent's on that seed, if both are known."""
        if trial.candidate.base != self._host.state.tip:
            return None
        pairs = self._host.bank.pairs(trial.candidate, self._host.steps_of(trial), [ask.seed])
        return dataclasses.replace(pairs[0], fresh=ask.stage == "certify") if pairs else None


_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
"""Date of commits that are never shown: equal rows are equal commits."""


def _fault(text: object) -> Fault | None:
    return next((fault for fault in get_args(Fault) if fault == text), None)
