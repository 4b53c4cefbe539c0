"""Bench memory: one simulated campaign of 700 attempts, and what the bench says of records that miss its targets."""

from __future__ import annotations

import dataclasses
from collections import Counter

from agent.bench.memory import NOTICED, Campaign, Record, Task, misses, play, summary
from agent.briefing.directions import DIRECTIONS


def test_a_campaign_of_700_attempts_repeats_nothing_and_notices_its_plateau() -> None:
    campaign = Campaign(Task(70_000, 700, (400, 500)))
    found = campaign.play()
    assert found.planted["same"] > 40 and found.planted["reworded"] > 40 and found.planted["renumbered"] > 20
    assert found.closed["change"] >= found.planted["same"]  # the repeats of a repeat are found too
    assert found.closed["behaviour"] > 3 and found.closed["retry"] > 10 and found.merged > 5
    assert found.on_newer_tip > 0  # not all old ideas in other words are seen: on a newer tip they are trained
    assert found.duplicate_runs == found.repeated_runs == 0
    assert found.noticed is not None and found.noticed <= NOTICED
    state = campaign.state
    seen = Counter((run.seed, run.steps, state.results[run.id].weights_sha256)
                   for run in state.runs.values() if run.trains)
    assert max(seen.values()) == 1  # the same, counted from the ledger's runs


def test_equal_tasks_are_equal_campaigns() -> None:
    task = Task(7, 120, (60, 90))
    assert play(task) == play(task) != play(dataclasses.replace(task, even=True))


def test_what_is_missed_is_said() -> None:
    good = Record(gain=10.0, merged=3, planted=Counter(same=1, reworded=1), noticed=20,
                  asked=Counter(dict(zip(DIRECTIONS, (20, 35, 25, 12, 8, 4, 6, 2, 2), strict=True))))
    assert misses([good], summary([good], [good])) == []
    bad = dataclasses.replace(good, duplicate_runs=2, noticed=None, early=90, asked=Counter(DIRECTIONS * 10))
    assert misses([bad], summary([bad], [])) == [
        "2 runs were made before", "a plateau was noticed after None attempts",
        "attempts follow gain with a rank correlation of 0.00 only",
        "the three best directions had 33% of the attempts only",
        "100% of the attempts before the barren stretch were asked on a plateau"]
