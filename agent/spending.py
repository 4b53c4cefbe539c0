"""How much of the night is left: each cap, less what the final number and a closing audit need.

What is on its way counts as if it had been spent, each job as the longest and each question as the dearest so far, so
a cap is passed by no more than the one run or the one question that turns out dearer than any before. Until a first
reply has come nobody knows what one costs, so under a cap on dollars or tokens one question is asked at a time.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable

from agent import runs
from agent.config import Caps
from agent.errors import UserError
from agent.ledger import Ledger, State
from agent.records import Purpose
from agent.site import Site

GB = 1e9
LOOK_SECONDS = 0.3
"""The folder is measured this often at most, and never for more than a twentieth of the time."""
REPORT = 500_000
"""Bytes that the report with its picture may take at the end."""


class Spending:
    """The limits of one campaign and what its state says of them. None: no such limit."""

    def __init__(self, site: Site, state: State, budget_runs: int | None, until: datetime.datetime | None,
                 pending: Callable[[], int] = lambda: 0) -> None:
        """``pending``: questions to the model that are on their way."""
        self.site, self.state, self.until, self._pending = site, state, until, pending
        gpus = site.config.train.gpus_per_run
        self.caps: Caps = site.config.caps.model_copy(update={
            "gpu_hours": site.config.caps.gpu_hours / gpus,
            "usd_per_gpu_hour": site.config.caps.usd_per_gpu_hour * gpus})
        """With hours of a slot, which may be several GPUs, in place of hours of a GPU."""
        self.budget_runs = budget_runs or self.caps.experiments or None
        self._disk, self._look_again = 0, 0.0

    # ------------------------------------------------------------------------------------------------- may it start?

    def forbids(self, purpose: Purpose, now: datetime.datetime) -> bool:
        """Whether a cap forbids one more run. The runs of the final number have theirs set aside (``final_pairs``)."""
        return purpose != "final" and bool(self.reached(now, purpose))

    def reached(self, now: datetime.datetime, purpose: Purpose = "pair") -> str:
        """Which cap forbids one more run; empty if none does. Tiny runs are no experiments, and audits need none."""
        if self.budget_runs is not None and purpose != "audit" and (
                self.used_runs >= self.budget_runs - self.reserved(self.budget_runs)):
            return f"{self.budget_runs} experiments"
        if self.out_of_time(now):
            return "wall time"
        if self.caps.gpu_hours and self._held(1 + self._kept_back) > self.caps.gpu_hours * 3600:
            return f"{self.site.config.caps.gpu_hours:g} GPU-hours"
        if self.caps.usd and self.dollars(1 + self._kept_back, 0) > self.caps.usd:
            return f"${self.caps.usd:g}"
        ahead = (1 + self._running + self._kept_back) / max(1, len(self.state.runs))
        if self.caps.disk_gb and self.disk * (1 + ahead) + REPORT > self.caps.disk_gb * GB:
            return f"{self.caps.disk_gb:g} GB on the disk"
        return ""

    def forbids_question(self) -> bool:
        """Whether a cap forbids one more question to the model."""
        caps, pending = self.caps, self.pending
        if not (caps.usd or caps.tokens):
            return False
        if not self.state.paid.calls:
            return pending > 0
        return bool(caps.tokens and self.tokens(pending + 1) > caps.tokens) or bool(
            caps.usd and self.dollars(self._kept_back, 1) > caps.usd)

    @property
    def questions_spent(self) -> str:
        """Which cap one more question would pass though none is on its way, so that no more will be asked; or empty."""
        caps, dearest = self.caps, self.state.dearest
        if caps.tokens and self.tokens(1) > caps.tokens:
            return f"{caps.tokens} tokens"
        usd = self.dollars(self._kept_back, 1 - self.pending) if dearest.usd else 0.0
        return f"${caps.usd:g} for one more question" if caps.usd and usd > caps.usd else ""

    def out_of_time(self, now: datetime.datetime) -> bool:
        """Whether what is left until the end is needed for the final pairs."""
        end = self.deadline
        return end is not None and now + datetime.timedelta(
            seconds=self._final_seconds * self.rounds(self._kept_back)) >= end

    def late(self, now: datetime.datetime) -> bool:
        """Whether the time is up: not even the runs of the final number may begin."""
        end = self.deadline
        return end is not None and now >= end

    # ------------------------------------------------------------------------------------------------ what is set aside

    def reserved(self, budget: int | None = None) -> int:
        """Runs set aside for the final number and for a closing audit of what is merged by now; of a small
        ``budget`` at most a third."""
        final = self.site.config.judge.final_pairs
        wanted = 2 * final + audit_runs(self.caps.audit_pairs, max(1, len(self.state.kept)), final)
        return wanted if budget is None else min(wanted, budget // 3)

    @property
    def _final_seconds(self) -> float:
        """Seconds of a run of the final number, its audit included."""
        return self.state.longest + (self.state.longest_light if self.site.config.evaluate.audit else 0.0)

    @property
    def _kept_back(self) -> int:
        return self.reserved(self.budget_runs)

    def final_pairs(self, now: datetime.datetime | None = None) -> int:
        """Pairs for the final number: as configured, or what the caps have left. Those of a night that was stopped
        while it made them are made already."""
        wanted, state = self.site.config.judge.final_pairs, self.state
        made = sum(r.purpose == "final" for r in state.runs.values())
        left: list[float] = []
        """Further runs."""
        if self.budget_runs is not None:
            left.append(self.budget_runs - self.used_runs)
        one = self._final_seconds
        if one:
            if self.caps.gpu_hours:
                left.append((self.caps.gpu_hours * 3600 - self._held(0)) // one)
            if self.caps.usd and self.caps.usd_per_gpu_hour:
                left.append((self.caps.usd - self.dollars(0, 0)) // (one / 3600 * self.caps.usd_per_gpu_hour))
            if self.deadline is not None and now is not None:
                left.append(max(0.0, (self.deadline - now).total_seconds() // one) * len(self.site.devices))
        return max(0, min(wanted, *(int(made + max(0, more)) // 2 for more in left))) if left else wanted

    def rounds(self, runs_: int) -> int:
        """Times that the slots must be filled for as many runs, and once for what runs now."""
        return -(-runs_ // len(self.site.devices)) + 1

    # --------------------------------------------------------------------------------------------------- what is spent

    def left(self, now: datetime.datetime) -> int | None:
        """Training runs that may still be started; None where neither a number nor a time limits them."""
        found, longest, end = [], self.state.longest, self.deadline
        if self.budget_runs is not None:
            found.append(self.budget_runs - self._kept_back - self.used_runs)
        if end is not None and longest:
            seconds = (end - now).total_seconds() - self._final_seconds * self.rounds(self._kept_back)
            found.append(int(seconds / longest * len(self.site.devices)))
        if self.caps.gpu_hours and longest:
            found.append(int((self.caps.gpu_hours * 3600 - self._held(self._kept_back)) / longest))
        if self.caps.usd and self.caps.usd_per_gpu_hour and longest:
            left = self.caps.usd - self.dollars(self._kept_back, 0)
            found.append(int(left / (longest / 3600 * self.caps.usd_per_gpu_hour)))
        return max(0, min(found)) if found else None

    @property
    def pending(self) -> int:
        """Questions to the model that are on their way."""
        return self._pending()

    @property
    def used_runs(self) -> int:
        return self.state.trained

    @property
    def deadline(self) -> datetime.datetime | None:
        """The earlier of the time to stop at and the end of the hours that it may work."""
        ends = [self.until] if self.until else []
        if self.caps.hours and self.state.session:
            left = self.caps.hours * 3600 - self.state.worked
            ends.append(datetime.datetime.fromisoformat(self.state.session) + datetime.timedelta(seconds=left))
        return min(ends, default=None)

    @property
    def _running(self) -> int:
        return len(self.state.runs) - len(self.state.results)

    def _held(self, more: int) -> float:
        """Seconds on slots: known ones, what runs now, and ``more`` runs."""
        return self.state.held + (self._running + more) * self.state.longest

    def dollars(self, more_runs: int, more_questions: int) -> float:
        """Dollars: known ones, what is on its way, and more."""
        return (self.state.paid.usd + (self.state.lost + self.pending + more_questions) * self.state.dearest.usd
                + self._held(more_runs) / 3600 * self.caps.usd_per_gpu_hour)

    def tokens(self, questions: int) -> int:
        """Tokens of the model: known ones and those of as many ``questions``."""
        paid, dearest = self.state.paid, self.state.dearest
        return paid.prompt_tokens + paid.completion_tokens + (self.state.lost + questions) * (
            dearest.prompt_tokens + dearest.completion_tokens)

    @property
    def disk(self) -> int:
        """Bytes of the run's folder, as measured some seconds ago."""
        begun = time.monotonic()
        if begun >= self._look_again:
            self._disk = runs.disk_size(self.site.folder)
            share = 20 if self.caps.disk_gb else 200  # a forecast may be of some minutes ago, a cap may not
            self._look_again = begun + max(LOOK_SECONDS, share * (time.monotonic() - begun))
        return self._disk


def lost(ledger: Ledger, replies: int) -> None:
    """Write down questions whose reply nobody will take: they are paid for all the same."""
    if replies:
        ledger.append("lost", {"replies": replies})


def audit_runs(pairs: int, merges: int, final_pairs: int) -> int:
    """Training runs of a closing audit (agent/closing.py) of as many merges, if none is decided early; 0 for no
    pairs."""
    return (pairs * (1 + merges) + (2 * pairs if merges > 1 else 0) + 2 * final_pairs) if pairs else 0


def parse_caps(texts: tuple[str, ...], config: Caps) -> Caps:
    """``config`` with ``NAME=VALUE`` texts of the command line laid over it. Raises UserError."""
    changes: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            changes[name] = float(value)
        except ValueError:
            changes[name] = math.nan
        if name not in Caps.model_fields or not 0 <= changes[name] < math.inf:
            raise UserError(f"--cap {text!r} is none.",
                            f"Write NAME=NUMBER with one of: {', '.join(Caps.model_fields)}.")
        if Caps.model_fields[name].annotation is int:
            changes[name] = int(changes[name])
    return config.model_copy(update=changes)
