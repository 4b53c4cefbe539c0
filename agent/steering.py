"""Steering: what a person tells a running campaign from another terminal, and how the campaign follows it.

An order is one line of ``orders.jsonl`` in the run's folder, appended under a lock and fsynced, so orders outlive a
kill of either side. The campaign reads new lines once a tick. It writes each as an ``order`` event, with its number
and with the reason if it is not followed, and then acts; the number is what keeps it from taking an order twice. All
that it does may be done again: after a kill ``obey`` does what an order of the ledger still asks for.

    pause, resume    no further job is started until it is resumed; running ones end by themselves
    stop             end like Ctrl-C, at once or when the running jobs have ended
    steer, forget    words that each briefing of the model shows, fenced, as the owner's; forget drops them
    veto             an attempt that is in work ends as rejected
    revert           a commit on the accepted branch takes a merge out of the tip again
    approve          a merge that waits for a person (``judge.approve``) is made

A candidate that waits has no verdict yet: if the tip moves meanwhile it is built and measured again like any other,
so that what is merged is still the tree that was measured against the tip it is merged on, and approved as such.

Does not cover: a reverted tip that fails to train, though each merge in it did; its seeds are left out one by one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from agent import git, merge
from agent.court import Conclusion, Court, Trial
from agent.errors import UserError
from agent.ledger import Attempt, Clock, Ledger, State, utc_now
from agent.llm.quote import one_line
from agent.patch import rebuilt
from agent.propose import MODELS
from agent.records import Merge, Order, OrderKind, Removal, Revert
from agent.show.screen import Observer
from agent.site import Site

FILE = "orders.jsonl"
TOUCHING = ("veto", "revert", "approve")
"""Orders that touch the tip or an attempt."""
LONGEST_WISH = 500
"""Characters of one steer."""


class Stopped(KeyboardInterrupt):
    """A person, or a deadline while a person is waited for, ends the night: like Ctrl-C, the same command goes on."""


class Night(Protocol):
    """What steering needs of a campaign."""

    trials: list[Trial]
    court: Court
    site: Site
    ledger: Ledger
    observer: Observer
    clock: Clock
    slots: Any
    spending: Any

    @property
    def state(self) -> State: ...

    def drop(self, trial: Trial) -> None: ...

    def conclude(self, trial: Trial, found: Conclusion) -> None: ...

    def start_over(self) -> None: ...

    def move_branch(self, merged: Merge | Removal | Revert) -> None: ...

    def close(self, attempt: Attempt, stage: Any, reason: str, outcome: str = "rejected", fault: Any = None,
              pairs: tuple[Any, ...] = ()) -> None: ...


# ------------------------------------------------------------------------------------------------- the person's side


def give(folder: Path, kind: OrderKind, text: str = "", candidate: str = "", clock: Clock = utc_now) -> int:
    """Append an order to the run's orders; its number. A torn line that a killed writer left is cut off."""
    text = one_line(text, LONGEST_WISH)
    file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        known = os.pread(file, os.fstat(file).st_size, 0)
        whole = known.rfind(b"\n") + 1
        os.ftruncate(file, whole)
        number = known[:whole].count(b"\n") + 1
        line = json.dumps({"number": number, "kind": kind, "text": text, "candidate": candidate,
                           "given": clock().isoformat(timespec="milliseconds")})
        os.pwrite(file, line.encode() + b"\n", whole)
        os.fsync(file)
    finally:
        os.close(file)
    return number


def given(folder: Path) -> Iterator[Order]:
    """Orders of the run. Raises UserError for a line that is none."""
    path = folder / FILE
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole yet
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
            yield Order(number, data["kind"], str(data["text"]), str(data["candidate"]), str(data["given"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is damaged ({error}).",
                            "Put an empty steer in its place:  "
                            '{"kind": "forget", "text": "", "candidate": "", "given": ""}') from error


def check(state: State, kind: OrderKind, attempt: Attempt | None, given: str = "") -> str:
    """Why this order cannot be followed as things stand; empty if it can. ``given``: when it was given."""
    if state.phase == "finished":
        return "the run is finished"
    if kind in ("stop", "stop-after-current") and given and given < state.session:
        return "it was meant for a process that has ended since"
    if attempt is None:
        if kind in ("veto", "revert", "approve"):
            return "there is no such attempt"
        wordless = kind == "steer" and state.campaign.get("proposer") not in MODELS
        return "no model proposes in this run, so nobody would read it" if wordless else ""
    name = attempt.proposal.id
    if kind == "veto" and attempt.proposal.parts and attempt.verdict is None:
        return f"{name} is a bundle in work: veto one of its parts ({', '.join(attempt.proposal.parts)})"
    if kind == "veto" and attempt.verdict is not None:
        return (f"{name} is merged already: take it back with  ratchet revert {attempt.number}" if attempt.merge else
                f"{name} has its verdict already: {attempt.verdict.outcome}")
    if kind == "approve" and name not in state.waiting:
        return f"{name} does not wait for approval"
    if kind == "revert" and attempt.verdict is not None and attempt.verdict.unit:
        return f"{name} was merged as a part of {attempt.verdict.unit}: take that back"
    if kind == "revert" and attempt.merge is None:
        return f"{name} was not merged"
    if kind == "revert" and any(one.candidate == name for one in state.reverts):
        return f"{name} was taken back already"
    return ""


# ----------------------------------------------------------------------------------------------- the campaign's side


class Steering:
    """Orders to one campaign, and the candidates that wait for approval. Its memory is the ledger's."""

    def __init__(self, night: Night) -> None:
        self._night = night
        self._folder = night.site.folder
        self._size = -1
        """Bytes of the orders when they were last read."""
        self._withheld: dict[str, tuple[Trial, Conclusion]] = {}
        self._told = False
        self.reason = "interrupted"
        """Why the night was stopped, for the ledger."""

    @property
    def resting(self) -> bool:
        """Whether no further job may be started."""
        return self._night.state.paused or self._night.state.stopping

    def obey(self, resting_only: bool = False) -> None:
        """Take the orders that have come. Called once a tick. Raises Stopped where one says so.

        ``resting_only``: the tip and the attempts must stay as they are, so other orders are left for later.
        """
        night, state = self._night, self._night.state
        try:
            size = (self._folder / FILE).stat().st_size
        except FileNotFoundError:
            size = 0
        if size != self._size:
            first = self._size < 0
            self._size = size
            if first and not resting_only:
                self._catch_up()
            elif first:
                self._size = -1
            taken = {one.number for one in state.orders}
            for order in [one for one in given(self._folder) if one.number not in taken]:
                if resting_only and order.kind in TOUCHING:
                    self._size = 0  # look again
                else:
                    self._take(order)
        if state.stopping and not night.slots.busy:
            self._stop("a person stopped it")

    def holds(self) -> bool:
        """Whether the night goes on though there is nothing to do: it is paused, or a person is waited for.

        Raises Stopped once its time is over.
        """
        night = self._night
        if not (night.state.paused or self._withheld):
            return False
        what = "it is paused" if night.state.paused else f"{', '.join(sorted(self._withheld))} wait for approval"
        if night.spending.out_of_time(night.clock()):
            self._stop(f"its time is over, and {what}")
        if not self._told and not night.state.paused and not night.slots.busy:
            self._told = True
            night.observer.note(f"nothing is left to do but to wait: {what} (ratchet approve ID, ratchet veto ID)")
        return True

    def withhold(self, trial: Trial, found: Conclusion) -> bool:
        """Whether an accepted candidate waits for a person. It then leaves the slots until it is approved."""
        night = self._night
        if not night.site.config.judge.approve or found.outcome != "accepted":
            return False
        tree = trial.candidate.tree
        if any((one.kind, one.candidate, one.tree) == ("approve", trial.id, tree) for one in night.state.orders
               if not one.refused):
            return False
        night.drop(trial)
        self._withheld[trial.id] = trial, found
        self._told = False
        if night.state.waiting.get(trial.id) != tree:
            night.ledger.append("waiting", {"candidate": trial.id, "tree": tree, "base": trial.candidate.base,
                                            "reason": found.reason})
            night.observer.note(f"{trial.id} passed the judge and waits for approval: {found.reason} "
                                f"(ratchet approve {trial.attempt.number}, ratchet veto {trial.attempt.number})")
        return True

    def release(self) -> list[Trial]:
        """The trials that wait, which the tip has left behind: they are built and measured again."""
        trials = [trial for trial, _ in self._withheld.values()]
        self._withheld.clear()
        return trials

    def _take(self, order: Order) -> None:
        """Write the order down, then follow it."""
        night, state = self._night, self._night.state
        attempt = state.attempts.get(order.candidate)
        refused = check(state, order.kind, attempt, order.given)
        tree, prepared = "", None
        if order.kind == "approve" and not refused:
            tree = state.waiting[order.candidate]
        if order.kind == "revert" and not refused and attempt is not None:
            prepared = self._prepare_revert(order, attempt)
            refused = "" if prepared else "later merges build on it, so it cannot be taken out alone"
        night.ledger.append("order", Order(order.number, order.kind, order.text, order.candidate, order.given, tree,
                                           refused))
        said = " ".join(part for part in (order.kind, order.candidate, order.text) if part)
        night.observer.note(f"order: {said}" + (f": not followed, {refused}" if refused else ""))
        if refused:
            return
        if order.kind == "stop":
            self._stop("a person stopped it")
        if attempt is None:
            return
        if order.kind == "veto":
            self._veto(order, attempt)
        elif order.kind == "approve" and order.candidate in self._withheld:
            night.conclude(*self._withheld.pop(order.candidate))
        elif prepared is not None:
            self._revert(prepared)

    def _catch_up(self) -> None:
        """What orders of the ledger still ask for: the earlier process died between order and effect. An approved
        candidate needs nothing here: its ruling comes again, and is no longer withheld."""
        state = self._night.state
        for order in [one for one in state.orders if not one.refused]:
            attempt = state.attempts.get(order.candidate)
            if attempt is None:
                continue
            if order.kind == "veto" and attempt.verdict is None:
                self._veto(order, attempt)
            elif order.kind == "revert" and all(one.candidate != order.candidate for one in state.reverts):
                prepared = self._prepare_revert(order, attempt)
                if prepared is not None:
                    self._revert(prepared)
        if state.paused:
            self._night.observer.note("the run is paused: `ratchet resume` goes on with it")

    def _veto(self, order: Order, attempt: Attempt) -> None:
        night, name = self._night, attempt.proposal.id
        withheld = self._withheld.pop(name, None)
        trial = withheld[0] if withheld else next((one for one in night.trials if one.id == name), None)
        if trial is not None:
            night.drop(trial)
            night.court.leave(trial)
        night.close(attempt, "merge", "a person vetoed it" + (f": {order.text}" if order.text else ""),
                    pairs=tuple(trial.pairs) if trial is not None else ())

    def _prepare_revert(self, order: Order, attempt: Attempt) -> Revert | None:
        """The commit, as an object, that takes a merge out of the tip; None where later ones build on it."""
        night, state, merged = self._night, self._night.state, attempt.merge
        assert merged is not None, "only a merge is taken back"
        repo = night.site.repo
        tree = git.without(repo, state.tip, [merged.new_tip])
        if tree is None:  # git's merge refuses neighbouring lines, on which edits made again may well agree
            others = [state.attempts[one.candidate].proposal for one in state.kept if one is not merged]
            tree = rebuilt(repo, night.site.prefix, night.site.start, others, night.site.config.source)
        if tree is None:
            return None
        return merge.prepare_revert(repo, order, merged, state.tip, tree, steps_without(state, merged),
                                    str(state.campaign["name"]), night.clock())

    def _revert(self, prepared: Revert) -> None:
        """Intent, compare-and-swap, outcome; then the trials start over on the new tip."""
        night = self._night
        night.ledger.append("revert_intent", prepared)
        night.move_branch(prepared)
        night.ledger.append("revert", prepared)
        night.start_over()

    def _stop(self, reason: str) -> None:
        self.reason = reason
        raise Stopped(reason)


def steps_without(state: State, merged: Merge) -> int:
    """Steps of the tip without this merge: its own change of the tip's steps taken back, and at most the start's.

    Steps are proportional to 1 / (cost of a step), so the factors of merges multiply; see charge.py.
    """
    start, place = int(state.campaign["steps"]), state.merges.index(merged)

    def of(one: Merge) -> int:
        return next((run.steps for run in reversed(state.attempts[one.candidate].runs) if run.purpose == "pair"), start)

    now = state.reverted.steps if state.reverted else of(state.merges[-1])
    before = of(state.merges[place - 1]) if place else start
    return min(start, round(now * before / of(merged))) if now and of(merged) else 0
