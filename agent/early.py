"""Which runs may be stopped early, and where. Pure; the stop itself is the sandbox's (sandbox/early.py).

Only a candidate's screening runs, never a certification's, whose runs all count. Fixed before the run: the step, the
incumbent's curve on that seed, and whether the patch is exempt because it may reshape the schedule: then its curve
half-way says nothing of its end.
"""

from __future__ import annotations

import re

from agent.config import Judge
from agent.records import Patch, Result

SCHEDULE = re.compile(r"(?i)sched|warm|decay|anneal|cool|momentum|\bsteps?\b|total_|max_iter|cosine|final_lr|min_lr")
"""In a changed line or a changed file's name: the patch may reshape the schedule."""


def exempt(patch: Patch) -> bool:
    """Whether the patch may reshape the schedule."""
    changed = [line[1:] for line in patch.diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return any(SCHEDULE.search(line) for line in [*changed, *patch.files])


def rival(judge: Judge, patch: Patch, incumbent: Result | None, steps: int) -> tuple[tuple[int, float], ...]:
    """The incumbent's curve that a screening run of ``steps`` must not be behind; empty: it is left to its end."""
    if not judge.early_stop or incumbent is None or incumbent.fault or incumbent.steps != steps or exempt(patch):
        return ()
    return incumbent.curve
