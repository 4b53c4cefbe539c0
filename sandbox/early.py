"""Early stop: is a run behind another one's training curve? Pure.

Both train on the same seed in the same data order, so that their losses at one step are of the same batches and differ
by the patch alone. A run is *behind* at a step when it was not ahead at any of the last ``POINTS`` points that both
have. That asks nothing of the curve's scale; a run that is equal to the bit is behind too, since it changes nothing.

The losses are the job's own word: one that lies can only keep itself alive. Does not cover: patches that reshape the
schedule, which may be level half-way and ahead at the end (the caller exempts them), and curves of other lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

POINTS = 4

Curve = Sequence[tuple[int, float]]
"""(step, training loss)."""


def behind(own: Curve, rival: Curve, step: int) -> bool:
    """Whether ``own`` is behind ``rival`` at ``step``; False where they share fewer than POINTS points up to there."""
    known = dict(rival)
    shared = [(loss, known[at]) for at, loss in own if at <= step and at in known][-POINTS:]
    return len(shared) == POINTS and all(mine >= other for mine, other in shared)
