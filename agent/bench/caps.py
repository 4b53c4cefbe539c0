"""Bench ``caps``: do caps hold, and does the forecast come true? Random campaigns over real HTTP and real jobs.

Each campaign draws its caps (one to three of experiments, wall time, GPU-hours, dollars, tokens, disk), slots, policy,
the length of a run, the model's tokens and delay, and how many of its proposals help. The trainer only sleeps and
prints a loss; the model is a stub that counts the tokens it served, also those whose reply nobody took any more.

    over       what was spent beyond a cap, in units of the dearest run or question of that campaign
               (of wall time: of its longest run with a second for starting and stopping processes)
    off        |forecast - spent| / spent, of experiments, GPU-hours, dollars, tokens and wall time, of the first
               forecast that counts as calibrated (forecast.py)
    half-time  the same of the newest forecast by half-time (half of the experiments done), and whether it is within the
               range that it gave itself

A campaign that ends before its forecast counts as calibrated is counted as that. Does not cover: GPUs, more than two
slots, kills (those are another bench's).
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import runs, tiny
from agent.bench.finding import Finding, own_environment
from agent.errors import UserError
from agent.forecast import WITHIN
from agent.ground import count, scratch
from agent.ledger import State, replay, seconds_between
from agent.llm.scripted import Delay, Fixed, ScriptedModel
from agent.llm.scripted import Say as Reply

MISSES = 0.02
"""Share of campaigns in which a calibrated forecast may be off by more than it promises; never in dollars."""
SLACK_SECONDS = 1.0
USD_PER_TOKEN = 1e-3
GPU_HOUR = 100.0
MEASURES = ("experiments", "gpu_hours", "usd", "tokens", "hours")


@dataclass(frozen=True, slots=True)
class World:
    """One random campaign."""

    seed: int
    caps: dict[str, float]
    slots: int
    policy: str
    train: float
    """Seconds of a run."""
    reply: float
    prompt: int
    completion: int
    """Tokens of a question and of its answer, on average; each is drawn between half and one and a half of it."""
    helpful: float
    """Share of proposals that lower the loss."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--campaigns", type=count, default=50, help="number of random campaigns")
    parser.add_argument("--first", type=int, default=1, help="seed of the first one")
    parser.add_argument("--experiments", type=count, default=96,
                        help="that the caps leave room for, give or take a quarter (96: a night)")
    parser.add_argument("--side-by-side", type=count, default=2, help="campaigns at a time")


def draw(seed: int, experiments: int) -> World:
    """The campaign of a seed: caps that end it after about that many training runs."""
    dice = random.Random(f"caps/{seed}")
    train, slots, wanted = dice.uniform(0.05, 0.3), dice.choice((1, 2)), dice.uniform(0.75, 1.25) * experiments
    prompt, completion = dice.randrange(400, 4000), dice.randrange(50, 800)
    held = train + 0.7  # a run, its share of tiny runs, and starting both
    usd = wanted * ((prompt + completion) * USD_PER_TOKEN * 0.6 + held / 3600 * GPU_HOUR)
    possible = {"experiments": round(wanted), "hours": wanted * held / slots / 3600, "gpu_hours": wanted * held / 3600,
                "usd": usd, "tokens": round(wanted * 0.6 * (prompt + completion)), "disk_gb": wanted * 0.00012 + 0.001}
    first = list(possible)[seed % len(possible)]
    others = dice.sample([name for name in possible if name != first], dice.choice((0, 1, 2)))
    caps = {name: possible[name] * (1.0 if name == first else dice.uniform(0.8, 1.6)) for name in (first, *others)}
    caps = {name: round(value) if name in ("experiments", "tokens") else value for name, value in caps.items()}
    return World(seed, caps, slots, dice.choice(("single", "single", "bundles")), train, dice.uniform(0.0, 0.8),
                 prompt, completion, dice.choice((0.0, 0.1, 0.3)))


def caps(options: argparse.Namespace, say: Callable[[str], None]) -> Finding:
    """All campaigns, some side by side."""
    worlds = [draw(seed, options.experiments) for seed in range(options.first, options.first + options.campaigns)]
    found: list[dict[str, Any]] = []
    failures: list[str] = []
    waiting, lock = list(reversed(worlds)), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not waiting or failures:
                    return
                world = waiting.pop()
            try:
                with scratch(options.runs, "caps") as folder:
                    one = measure(world, folder, options.level)
            except (UserError, OSError, subprocess.SubprocessError) as error:
                failures.append(f"campaign {world.seed}: {error}")
                return
            with lock:
                found.append(one)
                say(f"campaign {world.seed}: {one['ended']}; over {one['over']}; calibrated at {one['calibrated_at']}, "
                    f"off {one['off']}; at half-time off {one['off_half']}, said {one['said_half']}")

    threads = [threading.Thread(target=work) for _ in range(options.side_by_side)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        failures.append("interrupted")  # no further campaign is begun
        raise
    if failures:
        raise UserError(failures[0], "Run it alone with --first SEED --campaigns 1.")
    return finding(found)


def finding(found: list[dict[str, Any]]) -> Finding:
    """What all campaigns come to."""
    over = {name: max((one["over"][name] for one in found if name in one["over"]), default=0.0)
            for name in (*MEASURES, "disk_gb")}
    off, half = ({name: sorted(one[kind][name] for one in found if name in one[kind]) for name in MEASURES}
                 for kind in ("off", "off_half"))
    calibrated = [one for one in found if one["off"]]
    beyond = {name: sum(value > WITHIN for value in values) for name, values in off.items()}
    ranges = [one["off_half"][name] <= one["said_half"][name] for one in found for name in one["said_half"]]
    broken = sum(any(value > 1 for value in one["over"].values()) for one in found)
    rows = [(name, f"{over[name]:.2f}", str(len(off.get(name, ()))),
             f"{statistics.median(off[name]):.3f}" if off.get(name) else "-",
             f"{off[name][-1]:.3f}" if off.get(name) else "-", str(beyond.get(name, "-")),
             f"{statistics.median(half[name]):.3f}" if half.get(name) else "-")
            for name in (*MEASURES, "disk_gb")]
    facts = {"campaigns": len(found), "calibrated": len(calibrated), "caps_broken": broken, "over_at_most": over,
             "calibrated_at": statistics.median(one["calibrated_at"] for one in calibrated) if calibrated else None,
             "forecast_off_at_most": {name: values[-1] for name, values in off.items() if values},
             "forecast_off_median": {name: statistics.median(values) for name, values in off.items() if values},
             "forecasts_beyond_a_fifth": beyond,
             "half_off_median": {name: statistics.median(values) for name, values in half.items() if values},
             "half_beyond_a_fifth": {name: sum(value > WITHIN for value in values) for name, values in half.items()},
             "half_within_its_range": sum(ranges) / len(ranges) if ranges else None,
             "each": sorted(found, key=lambda one: int(one["seed"]))}
    return Finding(f"{len(found)} campaigns, {len(calibrated)} with a calibrated forecast, {broken} beyond a cap by "
                   "more than one run or question", facts,
                   ("measure", "over by at most", "calibrated", "off, median", "off, at most", "beyond a fifth",
                    "at half-time, median"), rows,
                   ["over: 1 is the one run or question that may be in flight"],
                   ok=not broken and not beyond["usd"]
                   and max(beyond.values()) <= math.ceil(MISSES * len(calibrated)))


def measure(world: World, folder: Path, level: int) -> dict[str, Any]:
    """Run one campaign in ``folder`` and hold its ledger against its caps. Raises UserError."""
    dice, numbers, lock = random.Random(f"caps/model/{world.seed}"), itertools.count(1), threading.Lock()
    served: list[tuple[int, int]] = []

    def answer(_: dict[str, Any]) -> Fixed:
        with lock:
            number = next(numbers)
            tokens = tuple(round(dice.uniform(0.5, 1.5) * mean) for mean in (world.prompt, world.completion))
            served.append((tokens[0], tokens[1]))
            name = f"{'BETTER' if dice.random() < world.helpful else 'WORSE'}_{number:03d}"
        edit = {"path": "settings.py", "search": f"{name} = 0", "replace": f"{name} = 1"}
        return Delay(world.reply, Reply(
            {"title": f"Change {number}", "hypothesis": "It sleeps as long.", "direction": "constants",
             "expected_effect": None, "edits": [edit]},
            usage={"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}))

    with ScriptedModel([], then=answer) as model:
        _write_target(folder / "target", world, model.base_url)
        words = [sys.executable, "-m", "agent.cli", "run", str(folder / "target"), "--name", "c", "--slots",
                 str(world.slots), "--level", str(level), "--unconfined", "--proposer", "llm", "--runs",
                 str(folder / "runs"), *(f"--cap={name}={value!r}" for name, value in world.caps.items())]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False,
                              env=own_environment(OPENAI_API_KEY="none"))
    if done.returncode:
        raise UserError(f"The campaign ended with exit code {done.returncode}.", (done.stdout + done.stderr)[-800:])
    place = folder / "runs" / "c"
    state, _ = replay(place / runs.LEDGER)
    said = [line.partition("ends at its cap: ")[2] for line in done.stdout.splitlines()]
    told = next((text for text in said if text), "no cap")
    return {"seed": world.seed, "caps": world.caps, "ended": told, "merged": len(state.merges),
            **account(state, world, served, runs.disk_size(place), _largest(place))}


def account(state: State, world: World, served: list[tuple[int, int]], disk: int, job: int) -> dict[str, Any]:
    """Spent, over and off, from the ledger and from what the model served."""
    longest = max(result.seconds for result in state.results.values())
    tokens, question = sum(map(sum, served)), max(map(sum, served))
    hours = seconds_between(state.first_time, state.last_time) / 3600
    spent = {"experiments": state.trained, "gpu_hours": state.held / 3600, "tokens": tokens, "hours": hours,
             "usd": tokens * USD_PER_TOKEN + state.held / 3600 * GPU_HOUR, "disk_gb": disk / 1e9}
    unit = {"experiments": 1.0, "gpu_hours": longest / 3600, "tokens": question, "disk_gb": job / 1e9,
            "hours": (longest + SLACK_SECONDS) / 3600,
            "usd": max(question * USD_PER_TOKEN, longest / 3600 * GPU_HOUR)}
    over = {name: round(max(0.0, spent[name] - cap) / unit[name], 4) for name, cap in world.caps.items()}
    foretold = [one for one in state.forecasts if one["basis"] == "calibrated"][:1]
    early = [one for one in state.forecasts if one["off"] and one["done"] <= state.trained / 2][-1:]
    return {"spent": spent, "over": over, "off": _off(foretold, spent), "off_half": _off(early, spent),
            "said_half": {name: early[0]["off"][name] for name in MEASURES if early and name in early[0]["off"]},
            "calibrated_at": round(foretold[0]["done"] / state.trained, 3) if foretold else None,
            "forecasts": state.forecasts}


def _off(foretold: list[dict[str, Any]], spent: dict[str, float]) -> dict[str, float]:
    """How far the forecast, if there is one, is from what was spent, as a share of that."""
    return {name: round(abs(foretold[0][name] - spent[name]) / spent[name], 4) for name in MEASURES
            if foretold and spent[name]}


def _largest(place: Path) -> int:
    return max((runs.disk_size(folder) for folder in (place / "jobs").iterdir()), default=0)


def _write_target(folder: Path, world: World, base_url: str) -> None:
    settings = "".join(f"BETTER_{number:03d} = 0\nWORSE_{number:03d} = 0\n" for number in range(1, 600))
    tiny.write_timed_target(folder, settings, f"""dice = random.Random(seed)
time.sleep({world.train} * dice.uniform(0.8, 1.2) * steps / 100)
on = [name for name, value in vars(settings).items() if value == 1]
loss = 3 + sum(-0.02 if name[0] == 'B' else 0.01 for name in on) + dice.gauss(0, 0.01)
""", f"""[judge]
policy = "{world.policy}"
final_pairs = 2

[caps]
usd_per_gpu_hour = {GPU_HOUR}

[limits]
wall_seconds = 30

[model]
base_url = "{base_url}"
name = "stub"
repairs = 0
usd_per_million_prompt = {USD_PER_TOKEN * 1e6}
usd_per_million_completion = {USD_PER_TOKEN * 1e6}
""")
