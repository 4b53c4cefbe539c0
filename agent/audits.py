"""Audits: which runs a trusted scorer asks again, and how far an honest model may differ. Pure.

A run's score comes from whole rows, which prove nothing (sandbox/audit.py says why). So

* the incumbent's first run is audited before the night begins: how its own answers differ sets the tolerance, since
  arithmetic differs with the shape of a question, above all in bf16;
* a candidate's first run is audited before the candidate advances beyond its first pair, and its last one before it is
  merged, both on all splits;
* of the candidates that the judge turns away, one in twenty is audited all the same, chosen by a hash of the run;
* the runs of the final number are audited.

The score of an audited run is the corrected one. Covers the sealed tier; the others have no answers to compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from agent.config import Config
from agent.judge import Ask, Ruling
from agent.ledger import State
from agent.records import Pair, Result

SHARE = 0.05
"""Of the candidates that do not advance, the share that is audited."""
MARGIN = 4.0
"""Tolerance as a multiple of what the incumbent itself shows."""
WIDEST = (2.0, 0.05)
"""(largest difference, mean) in nats that an incumbent may show at most. More is no arithmetic."""


def wanted(config: Config) -> bool:
    """Whether this target's runs can be audited."""
    return config.evaluate.tier == "sealed" and config.evaluate.audit > 0


def values(state: State, result: Result) -> dict[str, float]:
    """Score of a run by split: corrected where it was audited."""
    found = state.audited.get(result.id)
    scores = result.scores | (found.scores if found is not None and not found.fault else {})
    return {split: score.value for split, score in scores.items()}


def due(pairs: Sequence[Pair], ruling: Ask | Ruling, state: State) -> list[str]:
    """Ids of the candidate's runs that must be audited before ``ruling`` may be acted on."""
    good = [pair.candidate_run for pair in pairs if not pair.fault]
    if not good or len(good) < len(pairs):
        return []
    if isinstance(ruling, Ask):
        chosen = good[:1]
    elif ruling.outcome == "accepted":
        chosen = [good[0], good[-1]]
    else:
        chosen = good[:1] if drawn(good[0], str(state.campaign["start"])) else []
    known = state.audited
    return [name for name in dict.fromkeys(chosen) if name not in known]


def evidence(pairs: Sequence[Pair], state: State) -> dict[str, float | str]:
    """What the audits of these pairs' candidate runs showed, for the verdict; nothing where there was none."""
    known = state.audited
    found = [known[pair.candidate_run] for pair in pairs if pair.candidate_run in known]
    seen = [max(score.audit_max or 0.0, score.targeted_max or 0.0) for result in found
            for score in result.scores.values()]
    return {"audits": float(len(found)), "audit_max": max(seen)} if seen else {}


def tolerance(state: State) -> tuple[float, float]:
    """(largest difference, mean) in nats that a candidate may show, by what the incumbent's own audits showed.

    The scorer's defaults hold where they are wider; zeros ask for them.
    """
    return tolerated([result for run in state.runs.values() if run.purpose == "audit" and run.candidate is None
                      if (result := state.results.get(run.id)) and not result.fault])


def tolerated(own: Sequence[Result]) -> tuple[float, float]:
    """(largest difference, mean) in nats that a candidate may show where the incumbent's audits gave ``own``."""
    scores = [score for result in own for score in result.scores.values()]
    return (MARGIN * max((score.audit_max or 0.0 for score in scores), default=0.0),
            MARGIN * max((abs(score.audit_mean or 0.0) for score in scores), default=0.0))


def drawn(run: str, salt: str) -> bool:
    """One in twenty, the same after a restart; a patch cannot steer it, since its own id decides."""
    number = int.from_bytes(hashlib.sha256(f"{salt}/{run}".encode()).digest()[:4], "big")
    return number < SHARE * 2**32
