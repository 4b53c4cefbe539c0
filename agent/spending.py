"""How much of the night is left: runs and time, less what the final number needs."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from agent.ledger import State
from agent.records import Purpose
from agent.site import Site


@dataclass(frozen=True, slots=True)
class Spending:
    """The limits of one campaign and what its state says of them. None: no such limit."""

    site: Site
    state: State
    budget_runs: int | None
    until: datetime.datetime | None

    def forbids(self, purpose: Purpose, now: datetime.datetime) -> bool:
        """Whether the budget of runs or the clock forbids one more run. Tiny runs and audits are not counted."""
        if purpose == "final":
            return False
        if self.budget_runs is not None and purpose != "audit":
            reserve = min(2 * self.site.config.judge.final_pairs, self.budget_runs // 3)
            if self.used_runs >= self.budget_runs - reserve:
                return True
        return self.out_of_time(now)

    def left(self, now: datetime.datetime) -> int | None:
        """Training runs that may still be started; None where neither a number nor a time limits them."""
        found = []
        if self.budget_runs is not None:
            reserve = min(2 * self.site.config.judge.final_pairs, self.budget_runs // 3)
            found.append(self.budget_runs - reserve - self.used_runs)
        if self.until is not None and self.state.longest:
            slots = len(self.site.devices)
            rounds = -(-2 * self.site.config.judge.final_pairs // slots) + 1
            seconds = (self.until - now).total_seconds() - self.state.longest * rounds
            found.append(int(seconds / self.state.longest * slots))
        return max(0, min(found)) if found else None

    @property
    def used_runs(self) -> int:
        return self.state.trained

    def final_pairs(self) -> int:
        """Pairs for the final number: as configured, or what the budget of runs has left. Those of a night that
        was stopped while it made them are made already."""
        wanted = self.site.config.judge.final_pairs
        if self.budget_runs is None:
            return wanted
        made = sum(r.purpose == "final" for r in self.state.runs.values())
        return min(wanted, (self.budget_runs - self.used_runs + made) // 2)

    def out_of_time(self, now: datetime.datetime) -> bool:
        """Whether what is left until the end is needed for the final pairs."""
        if self.until is None:
            return False
        rounds = -(-2 * self.site.config.judge.final_pairs // len(self.site.devices)) + 1
        return now + datetime.timedelta(seconds=self.state.longest * rounds) >= self.until
