"""Needs: the runs that somebody waits for. Known already, on its way, or to be started: nothing else is asked of one.

A need is named by what it is (tree, seed, steps; for an audit the run), so whoever asks first has it run, and a
resumed campaign finds what was already paid for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from agent import audits, early
from agent.bank import Bank
from agent.ledger import Ledger
from agent.measure import Slots, audit_job, audit_of, compile_cache, job_of, keeps_cache, new_run
from agent.records import Patch, Purpose, Result, Run
from agent.site import Site
from sandbox.job import Job


@dataclass(frozen=True, slots=True)
class Need:
    """A run that somebody waits for: a training run of ``commit``, or an audit of the run ``audits``."""

    purpose: Purpose
    commit: str
    seed: int
    steps: int
    audits: str = ""
    patch: Patch | None = None
    """Of a screening run: it may be stopped early."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Looks needs up in the bank and on the slots, and starts what is missing. Holds nothing of its own."""

    site: Site
    ledger: Ledger
    bank: Bank
    slots: Slots

    def audit(self, result: Result) -> Need:
        """An audit of a finished run."""
        run_ = self.ledger.state.runs[result.id]
        return Need("audit", run_.tree, run_.seed, run_.steps, run_.id)

    def known(self, need: Need) -> Result | None:
        """What is known already of the run or audit that is needed."""
        if need.purpose == "audit":
            return self.ledger.state.audited.get(need.audits)
        return self.bank.result(self.bank.tree(need.commit), need.seed, need.steps)

    def on_its_way(self, need: Need) -> bool:
        tree = self.bank.tree(need.commit)
        return any(r.tree == tree and r.seed == need.seed and r.steps == need.steps and r.purpose != "preflight"
                   and r.audits == need.audits for r in self.slots.busy)

    def device_for(self, seed: int) -> str:
        """A seed's runs all use one device, so that a pair shares it."""
        return self.slots.home(seed)

    def start(self, need: Need, device: str, candidate: str | None) -> None:
        """Intent line, then the job."""
        known = self.ledger.state.runs.keys()
        if need.purpose == "audit":
            run_ = audit_of(self.ledger.state.runs[need.audits], known, device)
            job = self._audit_job(run_)
        else:
            owner = candidate if need.purpose in ("pair", "preflight") else None
            run_ = new_run(self.site, need.purpose, self.bank.tree(need.commit), need.seed, need.steps, device, owner,
                           known)
            twin = need.purpose == "preflight" and self.site.config.train.served
            job = job_of(self.site, run_, self.site.source(need.commit),
                         self.site.source(self.ledger.state.tip) if twin else None,
                         compile_cache(self.site, self.ledger.state), keeps_cache(self.site, self.ledger.state, run_))
            if need.patch is not None:
                judge = self.site.config.judge
                job = dataclasses.replace(
                    job, rival=early.rival(judge, need.patch, self.bank.incumbent(need.seed), need.steps),
                    stop_at=int(judge.early_stop * need.steps))
        self.ledger.append("run_started", run_)
        self.slots.start(run_, job)

    def _audit_job(self, run_: Run) -> Job:
        """A candidate is compared with the incumbent, and all are held to what the incumbent's first run showed."""
        audited = self.ledger.state.runs[run_.audits]
        compared = run_.candidate or audited.purpose == "ablation"
        incumbent = self.bank.place(self.ledger.state.tip, run_.seed, self.bank.tip_steps) if compared else None
        if incumbent is not None and incumbent.id == audited.id:
            incumbent = None
        allowed = audits.WIDEST if audited.purpose == "baseline" else audits.tolerance(self.ledger.state)
        return audit_job(self.site, run_, audited, self.site.source(run_.tree), allowed, incumbent)
