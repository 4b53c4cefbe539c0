"""Calibration: what a handful of runs of the start and of a few patches say about a night to come. Pure: no training,
disk, clock or chance.

``assess`` turns readings into numbers, warnings and a verdict (the keys of docs/calibrate.md), ``lines`` those into
text. Does not cover how noise or effects change once something was merged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent import evidence, power
from agent.config import Judge
from agent.power import deviation, paired
from agent.show.view import clean

PAIRS = (3, 4, 5, 6, 8)
POWER = 0.8
LATER = 20
"""Number of the hypothesis that stands for the later night, without a merge before it."""
MULTIPLES = (0.25, 0.5, 1.0, 2.0)
"""Effects, in seed sds, for which the runs are counted."""
DOUBT = 0.05
"""p-value below which a nuisance is told as found."""
CLOCK, DRIFT, SPREAD = 0.05, 0.02, 1.5
"""What a nuisance must come to as well: share of the variance, relative change over the calibration, ratio of sds."""

Kind = Literal["full", "again", "half", "long"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What was calibrated, and under which conditions."""

    target: str
    metric: str
    direction: str
    unit: str
    budget: float
    """Of a run, in ``unit``; 0: the target's command decides."""
    long: int
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    """``start``, then the cards."""
    slots: int
    seeded: bool
    """Whether a run is told its seed."""
    judge: Judge
    conditions: dict[str, Any]
    """preset, tier, level and the fingerprint, as they go into the JSON."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One run in numbers; fields as in sandbox.job.Result."""

    arm: str
    seed: int
    kind: Kind
    place: int
    """How many runs were started before it."""
    fault: str
    """Empty: the run is good."""
    scores: dict[str, float]
    steps: int | None
    """Reached; None: unknown."""
    tokens: int
    seconds: float
    train_seconds: float
    startup_seconds: float
    evaluate_seconds: float
    weights: str


def assess(setting: Setting, readings: Sequence[Reading]) -> dict[str, Any]:
    """What the readings say: the JSON object of docs/calibrate.md. Those of the start must be good."""
    start = _by_seed(readings, "start")
    values = [reading.scores["val"] for reading in start.values()]
    sd = deviation(values) or 0.0
    cards = [_card(readings, start, arm) for arm in setting.arms[1:]]
    measured = _pooled(cards)
    noise = _spread(measured.sd, measured.degrees) if measured.degrees else _spread(sd * math.sqrt(2), len(values) - 1)
    levels = {name: evidence.level(setting.judge.alpha, number, 0) / len(setting.judge.looks)
              for name, number in (("first", 1), ("later", LATER))}
    seconds = statistics.median(reading.seconds for reading in start.values())
    facts: dict[str, Any] = {
        "target": setting.target, **setting.conditions, "metric": setting.metric, "direction": setting.direction,
        "unit": setting.unit, "budget": setting.budget, "long": setting.long, "seeds": list(setting.seeds),
        "slots": setting.slots, "runs": len(readings),
        "start": {"mean": statistics.fmean(values),
                  "values": {split: [reading.scores[split] for reading in start.values()]
                             for split in next(iter(start.values())).scores}},
        "seed_sd": _spread(sd, len(values) - 1), "same_seed": _same_seed(readings, start),
        "paired_sd": noise | {"measured": bool(measured.degrees)}, "cards": cards,
        "floor": setting.judge.floor, "levels": levels,
        "visible": _visible(setting, noise["sd"], levels, seconds),
        "needed": _needed(setting, noise["sd"], levels["first"], sd),
        "run": {"seconds": seconds, **_shares(start)}, "throughput": _throughput(readings),
        "clock": _clock(readings), "movement": _movement(readings, start),
        "splits": _splits(start), "order": _order(setting, readings, cards)}
    stops, warnings = _stops(setting, facts), _warnings(setting, facts)
    remarks = [*_remarks(setting, facts), *(
        f"Half of the budget gave no number ({clean(one.fault)}), so whether the metric moves is not known."
        for one in readings if one.kind == "half" and one.fault)]
    return facts | {"usable": not stops, "warnings": [*stops, *warnings, *remarks],
                    "verdict": _verdict(setting, facts, stops, warnings)}


def _by_seed(readings: Sequence[Reading], arm: str, kind: Kind = "full") -> dict[int, Reading]:
    """Seed -> the good run of ``arm``."""
    return {one.seed: one for one in readings if one.arm == arm and one.kind == kind and not one.fault}


def _spread(sd: float, degrees: int) -> dict[str, Any]:
    low, high = power.spread(sd, degrees)
    return {"sd": sd, "degrees": degrees, "low": low, "high": high}


def _same_seed(readings: Sequence[Reading], start: dict[int, Reading]) -> dict[str, Any]:
    """One seed again: sd over its runs, and whether the weights are the same bits (None: none were handed over)."""
    again = [one for one in readings if one.kind == "again"]
    runs = [start[again[0].seed], *again]
    identical = len({one.weights for one in runs}) == 1 if runs[0].weights else None
    return {"sd": deviation([one.scores["val"] for one in runs]), "runs": len(runs), "identical_weights": identical}


def _card(readings: Sequence[Reading], start: dict[int, Reading], arm: str) -> dict[str, Any]:
    """One patch against the start on the seeds that both finished; effects are patch minus start, by split."""
    mine = _by_seed(readings, arm)
    effects = {split: paired([start[seed].scores[split] for seed in mine], [one.scores[split] for one in mine.values()])
               for split in next(iter(start.values())).scores}
    val = effects["val"]
    fault = next((f"seed {one.seed}: {one.fault}" for one in readings if one.arm == arm and one.fault), None)
    return {"card": arm, "n": val.n, "effect": val.effect, "se": val.error, "sd": val.sd,
            "correlation": val.correlation, "effects": {split: one.effect for split, one in effects.items()},
            "ses": {split: one.error for split, one in effects.items()}, "no_op": val.effect == 0 == val.sd,
            "fault": fault}


def _pooled(cards: Sequence[dict[str, Any]]) -> evidence.Pooled:
    """The paired variance over all patches. One that changes nothing is no patch to learn from."""
    found = evidence.Pooled()
    for card in cards:
        if card["sd"] is not None and not card["no_op"]:
            degrees = card["n"] - 1
            found = evidence.Pooled(found.squares + degrees * card["sd"] ** 2, found.degrees + degrees)
    return found


def _visible(setting: Setting, sd: float, levels: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    """The minimal detectable effect by number of pairs; both runs of a pair are counted, and runs fill the slots."""
    judge = setting.judge
    return [{"pairs": pairs, "runs": 2 * pairs, "seconds": math.ceil(2 * pairs / setting.slots) * seconds} | {
        name: judge.min_effect + power.visible(sd, pairs, level, judge.floor, POWER) for name, level in levels.items()}
        for pairs in sorted({*PAIRS, *(look for look in judge.looks if look > 1)})]


def _needed(setting: Setting, sd: float, level: float, seed_sd: float) -> list[dict[str, Any]]:
    """Pairs and runs for effects of a quarter to two seed sds; None where MOST_PAIRS do not do, or min_effect is not
    exceeded."""
    rows = []
    for effect in (float(f"{multiple * seed_sd:.2g}") for multiple in MULTIPLES if seed_sd > 0):
        above = effect - setting.judge.min_effect
        pairs = power.pairs_for(above, sd, level, setting.judge.floor, POWER) if above > 0 else None
        rows.append({"effect": effect, "pairs": pairs, "runs": 2 * pairs if pairs else None})
    return rows


def _shares(start: dict[int, Reading]) -> dict[str, float | None]:
    """Median shares of a run's seconds; start-up is not seen where the harness serves no batch."""
    def share(part: Callable[[Reading], float]) -> float:
        return statistics.median(part(one) / max(one.seconds, 1e-9) for one in start.values())
    startup = share(lambda one: one.startup_seconds)
    return {"startup_share": startup or None, "evaluate_share": share(lambda one: one.evaluate_seconds)}


def _throughput(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """Speed of the start, and its drift over the calibration: slope of log(steps a second) on the order in which runs
    were started, each arm at its own height. None where steps are unknown."""
    timed = [one for one in readings if one.kind in ("full", "again") and not one.fault and one.steps
             and one.train_seconds > 0]
    arms = {one.arm: [other for other in timed if other.arm == one.arm] for one in timed}
    if "start" not in arms:
        return None
    found = power.line([[(one.place, math.log((one.steps or 0) / one.train_seconds)) for one in runs]
                        for runs in arms.values()])
    last = max(one.place for one in timed) - min(one.place for one in timed)
    tokens = [one.tokens / one.train_seconds for one in arms["start"] if one.tokens]
    return {"steps_per_second": statistics.median((one.steps or 0) / one.train_seconds for one in arms["start"]),
            "tokens_per_second": statistics.median(tokens) if tokens else None,
            "drift_per_run": found.slope if found else None, "drift_p": found.p if found else None,
            "drift_total": math.expm1(found.slope * last) if found else None}


def _clock(readings: Sequence[Reading]) -> dict[str, Any] | None:
    """How much of the metric's variance goes with the steps that a run reached. None where all reached the same."""
    runs = [one for one in readings if one.kind in ("full", "again") and not one.fault and one.steps]
    found = power.line([[(one.steps or 0, one.scores["val"]) for one in runs if one.arm == arm]
                        for arm in dict.fromkeys(one.arm for one in runs)])
    if found is None:
        return None
    return {"share": found.share, "p": found.p, "per_step": found.slope, "degrees": found.degrees}


def _movement(readings: Sequence[Reading], start: dict[int, Reading]) -> dict[str, float] | None:
    """Split -> what the second half of the budget changed on one seed. None where no half run gave a number."""
    half = next((one for one in readings if one.kind == "half"), None)
    if half is None or half.fault:
        return None
    return {split: start[half.seed].scores[split] - value for split, value in half.scores.items()}


def _splits(start: dict[int, Reading]) -> dict[str, Any] | None:
    """val against confirm over the seeds. None outside the sealed tier."""
    if "confirm" not in next(iter(start.values())).scores:
        return None
    val, confirm = ([one.scores[split] for one in start.values()] for split in ("val", "confirm"))
    sds = deviation(val) or 0.0, deviation(confirm) or 0.0
    return {"correlation": power.correlation(val, confirm), "val_sd": sds[0], "confirm_sd": sds[1],
            "ratio": max(sds) / min(sds) if min(sds) > 0 else None, "p": power.same_spread(val, confirm)}


def _order(setting: Setting, readings: Sequence[Reading], cards: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The arms' effects at the two budgets, the start's being 0, and how well their orders agree."""
    if not setting.long:
        return None
    base = _by_seed(readings, "start", "long")
    effects = {}
    for card in cards:
        runs = _by_seed(readings, card["card"], "long")
        late = paired([base[seed].scores["val"] for seed in runs], [one.scores["val"] for one in runs.values()])
        if card["effect"] is not None and late.effect is not None:
            effects[card["card"]] = {"short": card["effect"], "long": late.effect, "n": late.n}
    found = power.order([0.0, *(row["short"] for row in effects.values())],
                        [0.0, *(row["long"] for row in effects.values())])
    kept = sum(row["short"] * row["long"] > 0 for row in effects.values())
    return {"effects": effects, "start": statistics.fmean(one.scores["val"] for one in base.values()),
            "signs_kept": kept, "arms": len(effects) + 1, "rho": found.rho if found else None,
            "p": found.p if found else None, "least_p": found.least if found else None}


# ------------------------------------------------------------------------------------------------------------ warnings


def _stops(setting: Setting, facts: dict[str, Any]) -> list[str]:
    """Why a night on this target would be in vain, each with its mend."""
    found = []
    values = facts["start"]["values"]["val"]
    if len(set(values)) == 1:
        mend = ("Let the trainer take its initialisation and data order from the seed that it is given"
                if setting.seeded else "Put {seed} into train.command and seed the trainer with it")
        found.append(f"All {len(values)} seeds gave the same {setting.metric} to the last digit: it is deterministic, "
                     f"does not depend on the seed, or is printed with too few digits. {mend}, and print more digits: "
                     "pairs without noise say nothing of how far a gain can be trusted.")
    if facts["movement"] and all(abs(change) <= 1e-9 * abs(values[0]) for change in facts["movement"].values()):
        found.append(f"The metric does not move: half of the budget gave the same {setting.metric}. Look whether "
                     "evaluate.pattern finds the number that training changes, and whether the budget reaches the "
                     "trainer.")
    return found


def _warnings(setting: Setting, facts: dict[str, Any]) -> list[str]:
    """What stands against trusting or affording a night as it is set up, most important first."""
    told = []
    clock, splits, moved = facts["clock"], facts["splits"], facts["movement"]
    if not setting.seeded:
        told.append("train.command takes no {seed}, so pairs share no noise. Put {seed} into it and seed the trainer.")
    if clock and clock["p"] < DOUBT and clock["share"] >= CLOCK:
        told.append(f"{clock['share']:.0%} of the noise is the clock (steps reached differ from run to run): use "
                    "charged steps, or steps where the harness does not serve the batches.")
    if _drifts(facts) and setting.unit == "seconds":
        told.append(f"{_drift_text(facts)}; under a budget in seconds that is an effect of its own.")
    if splits and splits["p"] < DOUBT and (splits["ratio"] is None or splits["ratio"] >= SPREAD):
        told.append(f"val and confirm differ in their noise (sd {size(splits['val_sd'])} and "
                    f"{size(splits['confirm_sd'])}): make them of like text and size.")
    against = [card["card"] for card in facts["cards"] if _opposed(card["effects"], card["ses"])]
    if against:
        told.append(f"val and confirm disagree on the direction of {', '.join(against)}: they are not of one kind.")
    if moved and "confirm" in moved and moved["val"] * moved["confirm"] < 0 and min(
            abs(moved["val"]), abs(moved["confirm"])) > 2 * facts["seed_sd"]["sd"]:
        told.append(f"The second half of a run moves val by {moved['val']:+.3g} and confirm by "
                    f"{moved['confirm']:+.3g}: they are not of one kind.")
    if moved and abs(moved["val"]) > 2 * facts["seed_sd"]["sd"] and (moved["val"] > 0) == (setting.direction == "min"):
        told.append(f"The second half of a run makes {setting.metric} worse ({moved['val']:+.3g}): a smaller budget "
                    "would do as well.")
    found = facts["order"]
    if found and found["rho"] is not None and found["rho"] <= 0:
        told.append(f"The order of the patches at {_budget_text(setting)} did not hold at {setting.long} (rho "
                    f"{found['rho']:+.2f}): what a night merges may be no gain in a longer run. Raise the budget.")
    return told


def _remarks(setting: Setting, facts: dict[str, Any]) -> list[str]:
    """What an owner should know and what stands against no night."""
    told = []
    if _drifts(facts) and setting.unit != "seconds":
        told.append(f"{_drift_text(facts)}; a budget in steps does not see it, but the night takes other time.")
    for card in facts["cards"]:
        if card["fault"]:
            told.append(f"Card {card['card']} failed on {clean(card['fault'])}.")
        elif card["no_op"]:
            told.append(f"Card {card['card']} changes nothing, so it says nothing of the paired sd.")
    return told


def _drifts(facts: dict[str, Any]) -> bool:
    speed = facts["throughput"]
    return bool(speed and speed["drift_p"] is not None and speed["drift_p"] < DOUBT
                and abs(speed["drift_total"]) >= DRIFT)


def _drift_text(facts: dict[str, Any]) -> str:
    return (f"The machine's speed changed by {facts['throughput']['drift_total']:+.1%} over the calibration: look what "
            "else runs on it, or lock its clocks")


def _opposed(effects: dict[str, float | None], errors: dict[str, float | None]) -> bool:
    """Whether val and confirm both show an effect of two standard errors or more, of opposite signs."""
    val, confirm = effects.get("val"), effects.get("confirm")
    if val is None or confirm is None or val * confirm >= 0:
        return False
    return all(abs(effect) >= 2 * (errors[split] or math.inf) for split, effect in (("val", val), ("confirm", confirm)))


def _verdict(setting: Setting, facts: dict[str, Any], stops: Sequence[str], warnings: Sequence[str]) -> str:
    """One or two sentences for the owner."""
    if stops:
        return f"Not ready for a night. {stops[0]}"
    row = max((row for row in facts["visible"] if row["pairs"] <= max(setting.judge.looks)),
              key=lambda row: int(row["pairs"]), default=facts["visible"][0])
    text = (f"At {_budget_text(setting)} you can see {size(row['first'])} {setting.metric} with {row['pairs']} pairs "
            f"({row['runs']} runs, about {duration(row['seconds'])})")
    if setting.judge.floor > facts["paired_sd"]["sd"]:
        text += f", where judge.floor ({setting.judge.floor:g}) and not the noise is the limit"
    if warnings:
        return f"{text}. {warnings[0]}"
    if facts["order"] and facts["order"]["rho"] is not None:
        return f"{text}. {_order_text(setting, facts['order'])}"
    return f"{text}. Nothing that was looked at stands against a night at this budget."


def _order_text(setting: Setting, found: dict[str, Any]) -> str:
    """How far the short run speaks for the long one, with how little so few arms can show."""
    kept = f"{found['signs_kept']} of {found['arms'] - 1} patches keep their sign at {setting.long}"
    if found["rho"] is None:
        return f"{kept}; too few arms finished both to compare their order."
    few = f" (of {found['arms']} arms even a perfect order has p = {found['least_p']:.2g})" if found[
        "least_p"] > 0.01 else ""
    if found["p"] < DOUBT:
        return f"The short run speaks for the long one: rho {found['rho']:+.2f}, p = {found['p']:.2g}{few}; {kept}."
    return (f"Whether the short run speaks for the long one is uncertain: rho {found['rho']:+.2f}, p = "
            f"{found['p']:.2g}{few}; {kept}.")


# ---------------------------------------------------------------------------------------------------------------- text


def lines(facts: dict[str, Any]) -> list[str]:
    """The facts for a person, the verdict last."""
    better = "lower" if facts["direction"] == "min" else "higher"
    budget = f"{facts['budget']:g} {_unit(facts['unit'])}" if facts["budget"] else "its own length"
    preset = f", preset {facts['preset']}" if facts["preset"] else ""
    return [
        f"{clean(facts['target'])}{preset}: {facts['metric']} ({better} is better) at {budget}; {len(facts['seeds'])} "
        f"seeds, {facts['runs']} runs, {facts['slots']} side by side, level {facts['level']} on {facts['device']}",
        *_noise_lines(facts), *_cost_lines(facts), *_check_lines(facts), "",
        f"effect found with {POWER:.0%} power, by a one-sided Student test at the first idea's level "
        f"({facts['levels']['first']:.2g}) and at number {LATER}'s without a merge ({facts['levels']['later']:.2g}):",
        "  pairs  runs      time       first       later",
        *(f"{row['pairs']:>7}{row['runs']:>6}{duration(row['seconds']):>10}{size(row['first']):>12}"
          f"{size(row['later']):>12}" for row in facts["visible"]),
        *(["", "runs needed for an effect of a quarter, half, one and two seed sds, as a first idea:",
           *(f"{size(row['effect']):>12}  " + (f"{row['runs']} runs ({row['pairs']} pairs)" if row["pairs"] else
                                               f"more than {2 * power.MOST_PAIRS} runs") for row in facts["needed"])]
          if facts["needed"] else []),
        *_card_lines(facts), "",
        *(_row("warning", text) for text in facts["warnings"] if text not in facts["verdict"]),
        _row("verdict", facts["verdict"])]


def _noise_lines(facts: dict[str, Any]) -> list[str]:
    seed, same, pair = facts["seed_sd"], facts["same_seed"], facts["paired_sd"]
    bits = {True: "the same weights each time: deterministic", False: "other weights each time: not deterministic",
            None: "no weights handed over to compare"}[same["identical_weights"]]
    if pair["measured"]:
        saves = 2 * seed["sd"] ** 2 / pair["sd"] ** 2 if pair["sd"] else math.inf
        source = f"; unpaired runs would need {saves:.1f} times as many"
    else:
        source = "; an upper bound, seed sd * sqrt(2): no patch was measured"
    return [_row("seed sd", f"{_sd(seed)}, around {facts['start']['mean']:.6g}"),
            _row("same seed", f"{bits}; sd {size(same['sd'])} over {same['runs']} runs"),
            _row("paired sd", f"{_sd(pair)}{source}")]


def _cost_lines(facts: dict[str, Any]) -> list[str]:
    run, speed = facts["run"], facts["throughput"]
    startup = "start-up is part of training" if run["startup_share"] is None else f"{run['startup_share']:.0%} start-up"
    told = [_row("run", f"{run['seconds']:.1f} s: {startup}, {run['evaluate_share']:.0%} evaluation")]
    if speed is None:
        return [*told, _row("speed", "unknown: the run prints no line like `step 120`")]
    tokens = f", {speed['tokens_per_second']:,.0f} tokens a second" if speed["tokens_per_second"] else ""
    drift = "" if speed["drift_p"] is None else (
        f"; drift {speed['drift_per_run']:+.2%} a run, {speed['drift_total']:+.1%} in all (p = {speed['drift_p']:.2g})")
    return [*told, _row("speed", f"{speed['steps_per_second']:.3g} steps a second{tokens}{drift}")]


def _check_lines(facts: dict[str, Any]) -> list[str]:
    told = []
    clock, moved, splits = facts["clock"], facts["movement"], facts["splits"]
    if clock:
        told.append(_row("clock", f"{clock['share']:.0%} of the variance goes with the steps reached (p = "
                                  f"{clock['p']:.2g}, {clock['degrees']} degrees of freedom)"))
    elif facts["throughput"] is None:
        told.append(_row("clock", "unknown: steps reached are not printed"))
    else:
        told.append(_row("clock", "no part of the noise: every run reached the same steps"))
    if moved:
        told.append(_row("half", "the second half of the budget changes " + ", ".join(
            f"{split} by {change:+.4g}" for split, change in moved.items())))
    if splits:
        ratio = "" if splits["ratio"] is None else f", sds {splits['ratio']:.2f} to 1 (p = {splits['p']:.2g})"
        seen = splits["correlation"]
        told.append(_row("splits", f"val and confirm correlate {'-' if seen is None else f'{seen:+.2f}'} over the "
                                   f"seeds{ratio}"))
    return told


def _card_lines(facts: dict[str, Any]) -> list[str]:
    """The patches, at both budgets where there are two."""
    if not facts["cards"]:
        return []
    late = facts["order"]["effects"] if facts["order"] else {}
    rows = ["", f"{'patch':<28}{'effect':>10}{'SE':>8}{'sd':>8}{'pairs':>7}{'   at the long budget' if late else ''}"]
    for card in facts["cards"]:
        row = (f"{card['card'][:28]:<28}{_signed(card['effect']):>10}{size(card['se']):>8}{size(card['sd']):>8}"
               f"{card['n']:>7}")
        rows.append(row + (f"{_signed(late[card['card']]['long']):>12} ({late[card['card']]['n']} pairs)"
                           if card["card"] in late else ""))
    if facts["order"] and facts["order"]["rho"] is not None:
        rows.append(f"order at {facts['budget']:g} and {facts['long']}: rho {facts['order']['rho']:+.2f} over "
                    f"{facts['order']['arms']} arms, start included, p = {facts['order']['p']:.2g} (a perfect order "
                    f"has {facts['order']['least_p']:.2g}); {facts['order']['signs_kept']} of "
                    f"{facts['order']['arms'] - 1} signs kept")
    return rows


def _row(name: str, text: str) -> str:
    return f"{name:<11}{text}"


def _sd(found: dict[str, Any]) -> str:
    return (f"{size(found['sd'])} ({found['degrees']} degrees of freedom; 90% interval {size(found['low'])} to "
            f"{size(found['high'])})")


def _signed(value: float | None) -> str:
    return "-" if value is None else ("-" if value < 0 else "+") + size(abs(value))


def size(value: float | None) -> str:
    """A size in the metric's unit: four decimals where they say enough, else three digits."""
    if value is None:
        return "-"
    return f"{value:.4f}" if 1e-3 <= value < 10 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _unit(unit: str) -> str:
    return "seconds" if unit == "seconds" else "steps"


def _budget_text(setting: Setting) -> str:
    return f"{setting.budget:g} {_unit(setting.unit)}" if setting.budget else "the command's own length"
