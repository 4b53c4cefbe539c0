"""Incumbent: what is known of the code at the tip and of how small an effect can be seen, in words for a briefing.

All numbers are the harness's own (sandbox/job.py); what the job printed of itself is returned apart, since it is
untrusted. Scores are of the val split, in three decimals. Pure: no disk, no clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from agent import power
from agent.config import Config
from agent.evidence import level
from agent.ledger import State
from agent.records import Result

CURVE_POINTS = 12
"""Points of the training curve that are shown."""
RECENT_PAIRS = 60
"""Attempts, the newest, whose pairs say how noisy a paired difference is."""


def find(state: State) -> Result | None:
    """The newest good run of the code at the tip, as far as the ledger's state alone can tell; else of the start."""
    tree = state.merges[-1].tree if state.merges and state.merges[-1].new_tip == state.tip else ""
    of_tip = [run.id for (own, _), runs in state.alike.items() if own == tree for run in runs
              if run.purpose in ("baseline", "pair", "weigh")] if tree else []
    of_tip.sort(key=lambda name: state.spans[name][0])
    return next((result for name in (*reversed(of_tip), *reversed(state.baselines))
                 if (result := state.results.get(name)) is not None and not result.fault), None)


def profile(result: Result, metric: str) -> str:
    """Score, curve, time by part, memory and size of one run, a line each."""
    lines = []
    score = result.scores.get("val")
    if score is not None:
        lines.append(f"{metric} on val {score.value:.3f}")
    if result.curve:
        lines.append("training loss by step: " + ", ".join(f"{step}: {loss:.3f}" for step, loss in thin(result.curve)))
    if result.steps and result.train_seconds > 0:
        step = result.train_seconds / result.steps
        lines.append(f"{result.steps} steps in {result.train_seconds:.1f} s, {1000 * step:.1f} ms a step"
                     + (f", {result.tokens / result.train_seconds:,.0f} tokens a second" if result.tokens else ""))
    if result.seconds > 0:
        parts = [("start-up", result.startup_seconds), ("first step", result.first_step_seconds),
                 ("training", result.train_seconds), ("evaluation", result.evaluate_seconds)]
        lines.append(f"a run takes {result.seconds:.1f} s: " + ", ".join(
            f"{name} {seconds:.1f} s" for name, seconds in parts if seconds > 0))
    if result.parameters:
        lines.append(f"{result.parameters:,} parameters")
    if result.parameters and result.tokens and result.train_seconds > 0:
        # 6 N a token, Kaplan et al. 2020; without attention's own part, so it errs on the low side
        rate = 6 * result.parameters * result.tokens / result.train_seconds
        lines.append(f"about {rate / 1e12:.3g} TFLOP/s of model arithmetic (6 N a token)")
    memory = [f"{result.peak_memory_mb:,.0f} MiB of memory" if result.peak_memory_mb else "",
              f"{result.gpu_memory_mb:,.0f} MiB of GPU memory" if result.gpu_memory_mb else ""]
    if any(memory):
        lines.append("peak " + ", ".join(filter(None, memory)))
    if result.fingerprint.get("device"):
        lines.append(f"device {result.fingerprint['device']}")
    return "\n".join(lines)


def printed(result: Result) -> str:
    """What the job printed of itself in the shape ``name: number``: untrusted, and never decided on."""
    return "\n".join(f"{name}: {value:.6g}" for name, value in list(result.reported.items())[:40])


def calibration(config: Config, state: State) -> str:
    """How small an effect can be seen here, by what the campaign has measured of its own noise."""
    values = [result.scores["val"].value for run in state.runs.values() if run.purpose == "baseline"
              and (result := state.results.get(run.id)) and not result.fault and "val" in result.scores]
    sds = _paired_sds(state)
    judge, parts = config.judge, []
    if len(values) > 2 and not state.merges:
        parts.append(f"between seeds the start's {config.metric.name} has sd {statistics.stdev(values):.3g}")
    noise = max(judge.floor, statistics.median(sds) if sds else 0.0)
    if sds:
        parts.append(f"a paired difference has sd {noise:.3g} here (median of {len(sds)} attempts)")
    else:
        parts.append(f"the sd of a paired difference is not known yet; none is believed below {judge.floor:g}")
    pairs = max(judge.looks)
    if pairs > 1 and noise > 0:
        merges = len(state.merges)
        each = level(judge.alpha, max(len(state.certifications), merges) + 1, merges) / len(judge.looks)
        seen = judge.min_effect + power.visible(noise, pairs, each, judge.floor)
        parts.append(f"a patch must be better by about {seen:.2g} to be merged with {pairs} pairs at 80 % power: "
                     "smaller effects cannot be seen one by one")
    return "; ".join(parts)


def thin(curve: Sequence[tuple[int, float]], most: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """``most`` points of a curve, the first and the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]


def _paired_sds(state: State) -> list[float]:
    """Observed sd of the val differences of each of the newest attempts with two pairs or more."""
    found = []
    for attempt in state.judged[-RECENT_PAIRS:]:
        assert attempt.verdict is not None
        seen = [pair.effect("val") for pair in attempt.verdict.pairs
                if not pair.fault and "val" in pair.candidate and "val" in pair.incumbent]
        if len(seen) > 1:
            sd = statistics.stdev(seen)
            if math.isfinite(sd):
                found.append(sd)
    return found
