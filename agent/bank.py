"""Bank: what has been measured, found again by tree, seed and steps. A view of the ledger's state; holds nothing.

Runs are named by what they are, so the runs of a merged candidate are the incumbent's runs from then on, and a
resumed campaign finds what was already paid for.
"""

from __future__ import annotations

from agent import audits, git
from agent.errors import UserError
from agent.ledger import State
from agent.records import Candidate, Pair, Result, Run
from agent.site import Site


class Bank:
    """Lookups over the runs of one campaign."""

    def __init__(self, site: Site, state: State) -> None:
        self._site, self._state = site, state
        self._trees: dict[str, str] = {}

    def tree(self, commit: str) -> str:
        """Tree of a commit of the campaign's clone."""
        if commit not in self._trees:
            self._trees[commit] = git.resolve(self._site.repo, f"{commit}^{{tree}}", "tree") or commit
        return self._trees[commit]

    @property
    def tip_steps(self) -> int:
        """Steps of the incumbent's runs: those that its candidate was charged, or its removal granted."""
        start = int(self._state.campaign["steps"])
        if self._state.reverted:
            return self._state.reverted.steps
        if self._state.removals:
            return self._state.removals[-1].steps
        if not self._state.merges:
            return start
        merged = self._state.attempts[self._state.merges[-1].candidate]
        return next((r.steps for r in reversed(merged.runs) if r.purpose == "pair"), start)

    def runs(self, tree: str, seed: int, steps: int) -> list[Run]:
        """Full runs of this kind, whoever asked for them."""
        return [r for r in self._state.alike.get((tree, steps), ()) if r.seed == seed and r.trains]

    def result(self, tree: str, seed: int, steps: int) -> Result | None:
        """The result of this very run; machine faults do not count."""
        for run in self.runs(tree, seed, steps):
            found = self._state.results.get(run.id)
            if found is not None and found.fault != "infra":
                return found
        return None

    def incumbent(self, seed: int) -> Result | None:
        """The tip's result on ``seed``."""
        return self.result(self.tree(self._state.tip), seed, self.tip_steps)

    def failed(self, commit: str) -> set[int]:
        """Seeds on which ``commit`` at the tip's steps failed by its own fault."""
        tree, steps = self.tree(commit), self.tip_steps
        return {run.seed for run in self._state.alike.get((tree, steps), ()) if run.trains
                and (found := self._state.results.get(run.id)) and found.fault not in (None, "infra")}

    def tries(self, run: Run) -> int:
        """Starts of this run that the machine failed (a stop is no failure, nor is a device that rests for it)."""
        alike = [r.id for r in self._state.alike.get((run.tree, run.steps), ())
                 if (r.seed, r.purpose) == (run.seed, run.purpose)]
        results = [self._state.results[name] for name in alike if name in self._state.results]
        return sum(r.fault == "infra" and r.message != "stopped" and not r.device_fault for r in results)

    def pairs(self, candidate: Candidate, steps: int, seeds: list[int]) -> list[Pair]:
        """Complete pairs of ``candidate`` with the tip, in the order of the seeds.

        Raises UserError when the two runs of a pair have different fingerprints: they are never compared.
        """
        pairs = []
        asked_again = self._state.audited
        for seed in seeds:
            old, new = self.incumbent(seed), self.result(candidate.tree, seed, steps)
            if old is not None and old.fault:
                continue
            if new is not None and new.id in asked_again and asked_again[new.id].fault:
                new = asked_again[new.id]
            if new is not None and new.fault:
                pairs.append(Pair(seed, {}, {}, old.id if old else "", new.id, new.fault))
            elif old is not None and new is not None:
                if old.fingerprint != new.fingerprint:
                    raise UserError(f"Runs {old.id} and {new.id} were made on different machines or versions.",
                                    "They cannot be compared; start a new run:  ratchet run --name NEW")
                pairs.append(Pair(seed, self.values(old), self.values(new), old.id, new.id))
        return pairs

    def at_start(self) -> list[Result]:
        """Good results of the start commit at its own steps: what a run may cost is measured on them."""
        tree, steps = self.tree(self._site.start), int(self._state.campaign["steps"])
        return [result for run in self._state.alike.get((tree, steps), ()) if run.trains
                and (result := self._state.results.get(run.id)) is not None and not result.fault and result.scores]

    def values(self, result: Result) -> dict[str, float]:
        """Score by split: corrected where the run was audited."""
        return audits.values(self._state, result)

    def place(self, commit: str, seed: int, steps: int) -> Run | None:
        """The run that gave ``result(commit's tree, seed, steps)``."""
        found = self.result(self.tree(commit), seed, steps)
        return self._state.runs[found.id] if found is not None else None
