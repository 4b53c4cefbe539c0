"""Runs that a bench knows and does not train again, and what a campaign would ask about them: charge and audit.

A run is named by (tree, seed, steps, corpus, fingerprint). The names may be kept in a file across calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agent import audits, charge, git
from agent.errors import UserError
from agent.ground import Ground, Wanted
from agent.measure import audit_job
from agent.records import Run
from sandbox.job import Job, Result, Score, write_atomically

SEEDS = (1, 2, 3)
"""Of the runs that compare; the first also screens, shows the machine's fingerprint and is audited."""

Asked = tuple[str, int, int]
"""A run: (commit, seed, steps)."""


@dataclass(slots=True)
class Bank:
    """What is known of runs, by (tree, seed, steps, corpus, fingerprint). ``trained``: runs that were done here."""

    ground: Ground
    steps: int
    path: Path | None
    known: dict[str, Result] = field(default_factory=dict)
    """No more of a result than its fault, val score and charges."""
    audited: dict[str, bool] = field(default_factory=dict)
    """Whether the run of this name passed its audit."""
    trained: int = 0
    _print: str = ""
    _own: tuple[Run, tuple[float, float]] | None = None
    """The start's run to audit beside, and the tolerance that its own audit gives."""

    def open(self) -> None:
        """Train the start once, which shows this machine's fingerprint, and read the file. Raises UserError."""
        first = self.ground.trained([Wanted(self.ground.start, SEEDS[0], self.steps, "start")])[0]
        self._print = json.dumps(first.fingerprint, sort_keys=True)
        if self.path is not None and self.path.exists():
            try:
                kept = json.loads(self.path.read_text(encoding="utf-8"))
                self.known = {name: _known(row) for name, row in kept["runs"].items()}
                self.audited = {name: bool(passed) for name, passed in kept["audits"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.path} holds no known runs ({error}).", "Give another --known.") from error
        if self._key((self.ground.start, SEEDS[0], self.steps)) not in self.known:  # another charge, another way
            self._keep((self.ground.start, SEEDS[0], self.steps), first)
        else:
            self.trained += 1

    def results(self, wanted: Sequence[Asked], label: str) -> list[Result]:
        """What is known of these runs; they are trained where nothing is."""
        missing = [one for one in dict.fromkeys(wanted) if self._key(one) not in self.known]
        found = self.ground.measure([Wanted(*one, label) for one in missing])
        for one, result in zip(missing, found, strict=True):
            self._keep(one, result)
        return [self.known[self._key(one)] for one in wanted]

    def honest(self, asked: Asked) -> bool:
        """Whether the run passes the audit of a campaign. Trains it once more, since an audit needs its weights."""
        key, ground = self._key(asked), self.ground
        if key not in self.audited and audits.wanted(ground.site.config):
            if self._own is None:
                own = self._weighty((ground.start, SEEDS[0], self.steps))
                own_audit = ground.finish([self._audit(own, own, (0.0, 0.0))], "audit of the start")
                self._own = own, audits.tolerated(own_audit)
            run = self._weighty(asked)
            self.audited[key] = not ground.finish([self._audit(run, *self._own)], "audit")[0].fault
            self._write()
        return self.audited.get(key, True)

    def too_dear(self, asked: Asked) -> int:
        """Steps with which the known run must be repeated since it cost more than the start's; 0 where it did not."""
        budget = self.ground.site.config.budget
        if budget.unit != "charged_steps":
            return 0
        first = self.results([(self.ground.start, seed, self.steps) for seed in SEEDS], "start")
        limit = charge.allowed(first, budget.dead_band)
        spent = charge.cost([self.known[self._key(asked)]], max(r.startup_charge for r in first),
                            max(r.evaluate_charge for r in first), self.ground.site.devices[0])
        return charge.fewer_steps(asked[2], spent, limit, budget.dead_band) if spent > limit else 0

    def _weighty(self, asked: Asked) -> Run:
        return self.ground.run(self.ground.trained([Wanted(*asked, "to audit", keep_weights=True)])[0])

    def _audit(self, run: Run, beside: Run, allowed: tuple[float, float]) -> tuple[Run, Job]:
        asked = replace(run, id=f"{run.id}-audit", folder=f"jobs/{run.id}-audit", purpose="audit", audits=run.id)
        site = self.ground.site
        return asked, audit_job(site, asked, run, site.source(run.tree), allowed, beside)

    def _key(self, asked: Asked) -> str:
        commit, seed, steps = asked
        site = self.ground.site
        tree = git.resolve(site.repo, f"{commit}^{{tree}}", "tree") or commit
        return json.dumps([tree, seed, steps, site.data.corpus if site.data else "", self._print])

    def _keep(self, asked: Asked, result: Result) -> None:
        if not result.fault and json.dumps(result.fingerprint, sort_keys=True) != self._print:
            raise UserError("The machine changed meanwhile.", "Measure on one kind of device.")
        self.known[self._key(asked)] = result
        self.trained += 1
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            rows = {name: [r.fault, None if r.fault else r.scores["val"].value, r.charge_seconds, r.startup_charge,
                           r.evaluate_charge] for name, r in self.known.items()}
            write_atomically(self.path, json.dumps({"runs": rows, "audits": self.audited}).encode())


def _known(row: Sequence[Any]) -> Result:
    fault, value, charged, startup, evaluate = row
    return Result("known", fault, "", {} if fault else {"val": Score(float(value), 1)}, charge_seconds=charged,
                  startup_charge=startup, evaluate_charge=evaluate)
