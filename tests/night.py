"""A synthetic night for the tests of what a person sees: real events, written through the real ledger."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from agent.ledger import Ledger, State
from agent.records import (
    Candidate,
    Cost,
    Edit,
    Estimate,
    Gain,
    Merge,
    Pair,
    Patch,
    Preflight,
    Proposal,
    Result,
    Run,
    Verdict,
)
from sandbox.job import Score

START = "a" * 40
DIFF = "--- a/model.py\n+++ b/model.py\n@@ -1 +1 @@\n-lr = 0.004\n+lr = 0.016\n"


def started(name: str, **changes: Any) -> dict[str, Any]:
    """Data of a ``started`` event."""
    return {
        "name": name, "target": "trainer", "target_name": "trainer", "toplevel": "", "prefix": "", "start": START,
        "preset": "cpu", "seed": 0, "proposer": "ideas", "metric": "val_bpb", "direction": "min", "tier": "sealed",
        "unit": "charged_steps", "amount": 300, "steps": 300, "device": "cpu", "slots": 2, "level": 2,
        "config": {"judge": {"alpha": 0.1, "looks": [4, 6], "floor": 0.002}}, "version": "0.1.0",
        "previous": "",
    } | changes


class Night:
    """Writes a campaign attempt by attempt. The clock goes on by one second an event."""

    def __init__(self, runs: Path, name: str, day: int = 1, **changes: Any) -> None:
        self.folder = runs / name
        self._now = datetime.datetime(2026, 3, day, 22, 0, tzinfo=datetime.UTC)
        self.ledger = Ledger(self.folder / "ledger.jsonl", self._tick)
        self.ledger.append("started", started(name, **changes))

    def _tick(self) -> datetime.datetime:
        self._now += datetime.timedelta(seconds=1)
        return self._now

    @property
    def state(self) -> State:
        return self.ledger.state

    def propose(self, title: str, usd: float = 0.0) -> str:
        number = len(self.state.attempts) + 1
        name = f"{number:03d}-{title.split()[0].lower()}"
        self.ledger.append("proposal", Proposal(
            name, self.state.tip, title, f"Because of {title}.", "ideas", edits=(Edit("model.py", "old", "new"),),
            cost=Cost(usd=usd, calls=1 if usd else 0), source="card", expected_effect=-0.01))
        return name

    def refuse(self, title: str, reason: str = "the text to replace is not there") -> str:
        """An attempt that ends where the patch is applied."""
        name = self.propose(title)
        self.ledger.append("verdict", Verdict(name, "rejected", "patch", reason))
        return name

    def crash(self, title: str) -> str:
        """An attempt whose full run ends in NaN."""
        name = self._through_preflight(title)
        self._run(name, f"{name}-1c", 1, Result(f"{name}-1c", "nan", "loss is NaN at step 120", seconds=5.0,
                                                log_tail="step 119 loss 7.1\nstep 120 loss nan\x1b[31m\n"))
        self.ledger.append("verdict", Verdict(name, "rejected", "measure", "loss is NaN at step 120", fault="nan"))
        return name

    def judge(self, title: str, effect: float, accept: bool, usd: float = 0.0) -> str:
        """An attempt that is measured on two pairs; merged when ``accept``."""
        name = self._through_preflight(title, usd)
        pairs = []
        for seed, off in ((1, 0.001), (2, -0.001)):
            for arm in "ic":
                run = f"{name}-{seed}{arm}"
                self._run(name if arm == "c" else None, run, seed, Result(
                    run, None, scores={"val": Score(2.2)}, tier="sealed", seconds=10.0, level=2))
            pairs.append(Pair(seed, {"val": 2.2}, {"val": 2.2 + effect + off}, f"{name}-{seed}i", f"{name}-{seed}c"))
        estimate = Estimate("val", effect, effect - 0.005, effect + 0.005, 2, 0.002)
        reason = "the interval is better than zero" if accept else "the interval holds zero"
        self.ledger.append("verdict", Verdict(name, "accepted" if accept else "inconclusive", "judge", reason, None,
                                              estimate, tuple(pairs), {"t": -8.25, "rule": "paired t"}))
        if accept:
            merge = Merge(name, self.state.tip, f"{len(self.state.merges) + 0xbeef:x}" * 10, "d" * 40, title)
            self.ledger.append("merge_intent", merge)
            self.ledger.append("merge", merge)
        return name

    def finish(self, effect: float = -0.1) -> None:
        pair = Pair(101, {"final": 2.2}, {"final": 2.2 + effect}, "f1", "f2")
        self.ledger.append("gain", Gain("val_bpb", "final", effect, effect - 0.01, effect + 0.02, (pair,) * 3, 2.2,
                                        2.2 + effect))
        self.ledger.append("finished", {})

    def _through_preflight(self, title: str, usd: float = 0.0) -> str:
        name = self.propose(title, usd)
        self.ledger.append("candidate", Candidate(name, f"candidates/{name}", self.state.tip, "c" * 40, "d" * 40,
                                                  Patch(DIFF, ("model.py",), 1, 1, "h", "n")))
        self._run(name, f"{name}-tiny", 1, Result(f"{name}-tiny", None, seconds=2.0, level=2), purpose="preflight")
        self.ledger.append("preflight", Preflight(name, True, "a dozen steps ran", steps=300, seconds=9.0))
        return name

    def _run(self, candidate: str | None, name: str, seed: int, result: Result, purpose: Any = "pair") -> None:
        self.ledger.append("run_started", Run(name, purpose, "d" * 40, seed, 300, "cpu", f"jobs/{name}", candidate))
        self.ledger.append("run_finished", result)


def whole_night(runs: Path, name: str = "2026-03-01", day: int = 1) -> Night:
    """Two merged, one refused on its number, one refused at the patch, one crashed; then the final number."""
    night = Night(runs, name, day)
    night.judge("Unembedding lr 0.004 -> 0.016", -0.08, accept=True, usd=0.25)
    night.refuse("Rotary base 100k")
    night.judge("QK scale x1.5", 0.002, accept=False)
    night.crash("Double batch")
    night.judge("Betas (0.8, 0.99)", -0.03, accept=True)
    night.finish()
    return night
