"""Calibration: the assessment on readings of known truth, and the whole command on tiny targets of each tier."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import calibrate, calibration, evidence, power, tiny
from agent.calibration import Reading, Setting
from agent.cli import edge
from agent.config import Judge
from agent.ideas import cards_of
from agent.resources import prompts

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("a", "b", "c")
EFFECTS = {"start": 0.0, "a": -0.03, "b": 0.02, "c": -0.01}


def world(seed_sd: float = 0.01, own_sd: float = 0.002, seeds: int = 6, arms: tuple[str, ...] = ("start", *CARDS),
          draw: int = 0, per_step: float = 0.0, drift: float = 0.0, long_effects: dict[str, float] | None = None,
          confirm_times: float = 1.0, half: float = 0.5) -> list[Reading]:
    """Readings of arms that share ``seed_sd`` within a seed and have ``own_sd`` each for themselves."""
    chance = np.random.default_rng(draw)
    luck = {seed: chance.normal(0, seed_sd, 2) for seed in range(1, seeds + 1)}
    found: list[Reading] = []

    def one(arm: str, seed: int, kind: calibration.Kind, effect: float) -> None:
        place, steps = len(found), 200
        if per_step:
            steps += round(chance.normal(0, 10))
        noise = luck[seed][0] + (chance.normal(0, own_sd) if arm != "start" else 0) + per_step * (steps - 200)
        scores = {"val": 2.5 + effect + noise,
                  "confirm": 2.6 + effect + confirm_times * noise + chance.normal(0, own_sd / 10)}
        found.append(Reading(arm, seed, kind, place, "", scores, steps, 1000 * steps, 13.0,
                             steps / 20 * (1 + drift * place) * float(np.exp(chance.normal(0, 0.003))), 2.0, 1.0,
                             f"{arm}{seed}{kind == 'half'}"))

    one("start", 1, "full", 0.0)
    found.append(dataclasses.replace(found[0], kind="again", place=1))
    one("start", 1, "half", half)
    for seed in range(1, seeds + 1):
        for arm in arms:
            if seed > 1 or arm != "start":
                one(arm, seed, "full", EFFECTS[arm])
    for seed in (1, 2):
        for arm in arms if long_effects is not None else ():
            one(arm, seed, "long", (long_effects or {}).get(arm, 0.0) - 0.2)
    return found


def setting(arms: tuple[str, ...] = ("start", *CARDS), seeds: int = 6, **changes: Any) -> Setting:
    made = Setting("world", "val_bpb", "min", "charged_steps", 200, 0, tuple(range(1, seeds + 1)), arms, 2, True,
                   Judge(looks=[3, 5], floor=0.0), {"preset": "cpu", "tier": "sealed", "level": 3, "device": "abacus"})
    return dataclasses.replace(made, **changes)


# -------------------------------------------------------------------------------------------------------- assessment


def test_noise_is_pooled_within_patches_and_the_effects_follow_from_it() -> None:
    facts = calibration.assess(setting(), world())
    seed, pair = facts["seed_sd"], facts["paired_sd"]
    assert seed["degrees"] == 5 and seed["low"] < seed["sd"] < seed["high"]
    assert pair["measured"] and pair["degrees"] == 15 and pair["low"] < 0.002 < pair["high"]
    assert pair["sd"] == pytest.approx((sum(card["sd"] ** 2 for card in facts["cards"]) / 3) ** 0.5)
    assert facts["same_seed"] == {"sd": 0.0, "runs": 2, "identical_weights": True}
    assert facts["levels"] == {"first": evidence.level(0.1, 1, 0) / 2, "later": evidence.level(0.1, 20, 0) / 2}
    assert [row["pairs"] for row in facts["visible"]] == [3, 4, 5, 6, 8]
    for row in facts["visible"]:
        assert row["first"] == pytest.approx(power.visible(pair["sd"], row["pairs"], facts["levels"]["first"]))
        assert row["later"] > row["first"] and row["runs"] == 2 * row["pairs"] and row["seconds"] == row["pairs"] * 13
    for card in facts["cards"]:
        assert card["effect"] == pytest.approx(EFFECTS[card["card"]], abs=0.005) and card["n"] == 6
    assert facts["usable"] and facts["warnings"] == [] and facts["order"] is None
    assert facts["verdict"] == (
        f"At 200 steps you can see {calibration.size(facts['visible'][2]['first'])} val_bpb with 5 pairs (10 runs, "
        "about 65 s). Nothing that was looked at stands against a night at this budget.")
    needed = {row["effect"]: row for row in facts["needed"]}
    assert len(needed) == 4 and all(row["runs"] == 2 * row["pairs"] for row in needed.values())
    assert list(needed) == sorted(needed) and max(needed) == pytest.approx(2 * seed["sd"], rel=0.05)


def test_without_patches_the_paired_sd_is_a_bound() -> None:
    facts = calibration.assess(setting(("start",)), world(arms=("start",)))
    assert facts["paired_sd"]["measured"] is False and facts["paired_sd"]["degrees"] == 5
    assert facts["paired_sd"]["sd"] == pytest.approx(facts["seed_sd"]["sd"] * 2 ** 0.5)
    assert any("an upper bound, seed sd * sqrt(2)" in line for line in calibration.lines(facts))


def test_a_patch_that_changes_nothing_or_fails_is_told_and_not_counted() -> None:
    readings = world()
    same = {one.seed: one.scores for one in readings if one.arm == "start" and one.kind == "full"}
    readings = [dataclasses.replace(one, scores=same[one.seed]) if one.arm == "a" else
                dataclasses.replace(one, fault="crash: \x1bNameError", scores={}) if one.arm == "b" else one
                for one in readings]
    facts = calibration.assess(setting(), readings)
    assert facts["paired_sd"]["degrees"] == 5 and facts["paired_sd"]["sd"] == facts["cards"][2]["sd"]
    assert [facts["cards"][1][key] for key in ("n", "effect", "sd")] == [0, None, None]
    assert facts["warnings"] == ["Card a changes nothing, so it says nothing of the paired sd.",
                                 "Card b failed on seed 1: crash: NameError."]
    assert json.dumps(facts, allow_nan=False) and calibration.lines(facts)


def test_the_floor_and_the_least_effect_of_the_judge_are_counted() -> None:
    judge = Judge(looks=[3, 5], floor=0.02, min_effect=0.1)
    facts = calibration.assess(setting(judge=judge), world())
    row = next(row for row in facts["visible"] if row["pairs"] == 5)
    assert row["first"] == pytest.approx(
        0.1 + power.visible(facts["paired_sd"]["sd"], 5, facts["levels"]["first"], 0.02))
    assert "where judge.floor (0.02) and not the noise is the limit" in facts["verdict"]
    assert all(row["pairs"] is None for row in facts["needed"])


def test_the_share_of_the_clock_is_found_where_steps_differ() -> None:
    """Half of the noise of a run goes with the steps that it reached."""
    facts = calibration.assess(setting(unit="seconds", budget=40), world(per_step=-0.004, seed_sd=0.04, own_sd=0.0))
    assert facts["clock"]["p"] < 0.05 and 0.1 < facts["clock"]["share"] < 0.9
    assert facts["clock"]["per_step"] == pytest.approx(-0.004, abs=0.003) and facts["clock"]["degrees"] == 20
    assert "of the noise is the clock" in facts["warnings"][0] and facts["warnings"][0] in facts["verdict"]
    assert facts["verdict"].startswith("At 40 seconds you can see ")
    assert calibration.assess(setting(), world())["clock"] is None


def test_a_machine_that_slows_down_is_told() -> None:
    facts = calibration.assess(setting(), world(drift=0.004))
    assert facts["throughput"]["drift_per_run"] == pytest.approx(-0.004, abs=0.001)
    assert facts["throughput"]["drift_p"] < 0.01 and facts["throughput"]["drift_total"] < -0.05
    assert facts["throughput"]["tokens_per_second"] == pytest.approx(
        1000 * facts["throughput"]["steps_per_second"], rel=0.01)
    assert facts["warnings"][0].startswith("The machine's speed changed by -")
    assert facts["verdict"].endswith("Nothing that was looked at stands against a night at this budget.")
    timed = calibration.assess(setting(unit="seconds"), world(drift=0.004))
    assert timed["warnings"][0].endswith("an effect of its own.") and timed["warnings"][0] in timed["verdict"]
    alarms = [calibration.assess(setting(), world(draw=draw))["throughput"]["drift_p"] < 0.05 for draw in range(40)]
    assert sum(alarms) <= 6


@pytest.mark.parametrize(("seeded", "mend"), [(True, "Let the trainer take its initialisation"),
                                              (False, "Put {seed} into train.command")])
def test_a_metric_without_noise_is_refused(seeded: bool, mend: str) -> None:
    facts = calibration.assess(setting(seeded=seeded), world(seed_sd=0.0, own_sd=0.0))
    assert not facts["usable"] and facts["needed"] == [] and mend in facts["verdict"]
    assert facts["verdict"].startswith("Not ready for a night. All 6 seeds gave the same val_bpb to the last digit")
    assert json.dumps(facts, allow_nan=False) and calibration.lines(facts)[-1].startswith("verdict    Not ready")


def test_a_metric_that_does_not_move_or_gets_worse_is_told() -> None:
    readings = world(own_sd=0.0)
    first = readings[0].scores
    still = [dataclasses.replace(one, scores=first) if one.kind == "half" else one for one in readings]
    facts = calibration.assess(setting(), still)
    assert not facts["usable"] and "The metric does not move: half of the budget" in facts["verdict"]
    worse = calibration.assess(setting(), world(half=-0.5))
    assert worse["usable"] and worse["warnings"][0].startswith("The second half of a run makes val_bpb worse (+0.5")
    better = calibration.assess(setting(direction="max"), world(half=-0.5))
    assert better["warnings"] == []
    silent = [dataclasses.replace(one, fault="no_metric: nothing printed", scores={}) if one.kind == "half" else one
              for one in world()]
    unknown = calibration.assess(setting(), silent)
    assert unknown["usable"] and unknown["movement"] is None
    assert unknown["warnings"] == ["Half of the budget gave no number (no_metric: nothing printed), so whether the "
                                   "metric moves is not known."]


def test_the_verdict_speaks_of_the_last_look() -> None:
    for looks, pairs in (([4, 7], 7), ([1], 3), ([2], 2)):
        facts = calibration.assess(setting(judge=Judge(looks=looks, floor=0.0)), world())
        assert f"with {pairs} pairs" in facts["verdict"]


def test_splits_that_disagree_are_told() -> None:
    noisy = calibration.assess(setting(), world(confirm_times=4.0))
    assert noisy["splits"]["ratio"] == pytest.approx(4, rel=0.1) and noisy["splits"]["correlation"] > 0.9
    assert noisy["warnings"][0].startswith("val and confirm differ in their noise (sd ")
    readings = [dataclasses.replace(one, scores=one.scores | {"confirm": one.scores["confirm"] + 0.06})
                if one.arm == "a" else one for one in world()]
    against = calibration.assess(setting(), readings)
    assert against["warnings"] == ["val and confirm disagree on the direction of a: they are not of one kind."]
    moved = [dataclasses.replace(one, scores=one.scores | {"confirm": one.scores["confirm"] - 1.0})
             if one.kind == "half" else one for one in world()]
    assert "The second half of a run moves val by -0.5 and confirm by +0.5" in " ".join(
        calibration.assess(setting(), moved)["warnings"])
    alone = [dataclasses.replace(one, scores={"val": one.scores["val"]}) for one in world()]
    assert calibration.assess(setting(), alone)["splits"] is None


@pytest.mark.parametrize(("late", "rho", "p", "says"), [
    ({"a": -0.04, "b": 0.03, "c": -0.02}, 1.0, 1 / 24, "The short run speaks for the long one: rho +1.00"),
    ({"a": -0.02, "b": 0.03, "c": -0.04}, 0.8, 4 / 24, "the short run speaks for the long one is uncertain: rho +0.80"),
    ({"a": 0.04, "b": -0.03, "c": 0.02}, -1.0, 1.0, "The order of the patches at 200 steps did not hold at 400")])
def test_whether_the_short_run_speaks_for_the_long_one(late: dict[str, float], rho: float, p: float, says: str) -> None:
    facts = calibration.assess(setting(long=400), world(long_effects=late, own_sd=0.001))
    found = facts["order"]
    assert (found["rho"], found["p"], found["least_p"], found["arms"]) == pytest.approx((rho, p, 1 / 24, 4))
    assert found["effects"]["a"]["long"] == pytest.approx(late["a"], abs=0.003) and found["effects"]["a"]["n"] == 2
    assert says in facts["verdict"] and found["signs_kept"] == (3 if rho > 0 else 0)
    assert any("at the long budget" in line for line in calibration.lines(facts))


def test_sizes_and_durations_are_short() -> None:
    assert [calibration.size(value) for value in (None, 0.0, 0.00012345, 0.012345, 1234.5)] == [
        "-", "0", "0.000123", "0.0123", "1.23e+03"]
    assert [calibration.duration(seconds) for seconds in (65, 125, 9000)] == ["65 s", "2 min", "2.5 h"]


def test_the_default_patches_are_cards_of_their_preset() -> None:
    for preset, names in calibrate.CARDS.items():
        assert all(preset in card.presets for card in cards_of(names, prompts() / "ideas"))
        assert len(names) + 1 >= calibrate.LEAST_ARMS


@pytest.mark.parametrize(("printed", "steps"), [
    ("step 12/40 loss: 2.5\nstep 13/40", "13"), ("num_steps: 953", "953"), ("iter=7", "7"),
    ("timesteps 4\n5 steps a second", None), ("Iteration 41: 0.2", "41")])
def test_steps_are_read_from_what_a_run_prints(printed: str, steps: str | None) -> None:
    found = calibrate.STEP.findall(printed)
    assert (found[-1] if found else None) == steps


# --------------------------------------------------------------------------------------------------- the whole command


def cards(folder: Path) -> None:
    """Cards of the tiny target's known changes, and one of another preset."""
    folder.mkdir()
    for name, known in tiny.KNOWN.items():
        text = "\n".join(f"{key} = {value}" for key, value in (
            ("path", f"'{known.edit.path}'"), ("search", f"'''{known.edit.search}'''"),
            ("replace", f"'''{known.edit.replace}'''")))
        (folder / f"{name.replace(' ', '-')}.toml").write_text(
            f"title = '{name}'\nmechanism = 'known'\nreference = 'none'\n[[edits]]\n{text}\n")
    (folder / "elsewhere.toml").write_text((folder / "another-salt.toml").read_text().replace(
        "[[edits]]", "presets = ['large']\n[[edits]]"))


def repository(folder: Path, train: str, config: str) -> Path:
    tiny.write_repository(folder, {"train.py": train, "ratchet.toml": config})
    return folder


def run(capsys: pytest.CaptureFixture[str], folder: Path, repo: Path, *more: str, code: int = 0) -> str:
    """What the command prints; it leaves nothing but prepared data."""
    runs = folder / "runs"
    assert edge(["calibrate", str(repo), "--runs", str(runs), "--slots", "2", *more]) == code
    assert {path.name for path in runs.iterdir()} <= {".data"}
    return capsys.readouterr().out


def test_the_served_target_with_patches_at_two_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_tiny_target(tmp_path / "repo")
    cards(tmp_path / "ideas")
    facts = json.loads(run(capsys, tmp_path, tmp_path / "repo", "--ideas", str(tmp_path / "ideas"), "--cards",
                           "less-smoothing,another-salt,more-uniform", "--seeds", "3", "--long", "40", "--json"))
    assert facts["seeds"] == [1, 2, 3] and facts["runs"] == 3 + 2 + 3 * 3 + 2 * 4 and facts["usable"]
    assert facts["same_seed"] == {"sd": 0.0, "runs": 2, "identical_weights": True}
    assert facts["seed_sd"]["sd"] > 0 and facts["paired_sd"]["degrees"] == 6
    effects = {card["card"]: card["effect"] for card in facts["cards"]}
    assert effects["less-smoothing"] == pytest.approx(-1.10, abs=0.1) and effects["more-uniform"] > 0.2
    assert facts["movement"]["val"] < 0 and set(facts["movement"]) == {"val", "confirm"} == set(
        facts["start"]["values"])
    assert facts["order"]["arms"] == 4 and facts["order"]["effects"]["less-smoothing"]["long"] < 0
    assert facts["throughput"]["steps_per_second"] > 0 and facts["clock"] is None
    assert 0 < facts["run"]["startup_share"] < 1 and 0 < facts["run"]["evaluate_share"] < 1
    text = (ROOT / "docs/calibrate.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == [
        key for key in facts if key not in ("driver", "torch", "python", "ruler", "device", "level", "tier", "preset")]


def test_a_foreign_target_with_its_own_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_foreign_target(tmp_path / "repo")
    text = run(capsys, tmp_path, tmp_path / "repo", "--seeds", "3", "--steps", "20")
    assert text.startswith("line: quality (higher is better) at 20 steps; 3 seeds, 5 runs, 2 side by side")
    for part in ("no weights handed over to compare; sd 0 over 2 runs", "an upper bound, seed sd * sqrt(2)",
                 "start-up is part of training", "every run reached the same steps", "  pairs  runs      time"):
        assert part in text
    assert text.splitlines()[-1].startswith("verdict    At 20 steps you can see ")


CLOCKED = """
import random, sys, time
seed, end, steps = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    time.sleep(random.uniform(0.005, 0.03))
    steps += 1
print("step", steps)
print("loss:", 10 / (10 + steps) + random.Random(seed).gauss(0, 1e-4))
"""


def test_a_target_budgeted_in_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = repository(tmp_path / "repo", CLOCKED, '[train]\ncommand = "python train.py {seed} {seconds}"\n[evaluate]\n'
                      "pattern = 'loss: ([0-9.]+)'\n[metric]\nname = 'loss'\n[budget]\nunit = 'seconds'\namount = 9\n")
    facts = json.loads(run(capsys, tmp_path, repo, "--seeds", "3", "--steps", "1", "--json"))
    assert (facts["unit"], facts["budget"], facts["tier"]) == ("seconds", 1.0, "reported")
    assert facts["clock"]["degrees"] == 2 and facts["clock"]["per_step"] < 0 and facts["movement"]["val"] < 0
    # whole steps: on a quiet machine two runs of one second may well count the same
    assert 0 <= facts["same_seed"]["sd"] < 0.5 and 20 < facts["throughput"]["steps_per_second"] < 100
    assert "At 1 seconds you can see" in facts["verdict"]


def test_a_target_whose_number_never_changes_ends_with_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                  ) -> None:
    repo = repository(tmp_path / "repo", "print('loss: 2.5')\n",
                      '[train]\ncommand = "python train.py {steps}"\n[evaluate]\n'
                      "pattern = 'loss: ([0-9.]+)'\n[budget]\namount = 10\n")
    text = run(capsys, tmp_path, repo, "--seeds", "3", code=1)
    assert "All 3 seeds gave the same val_bpb to the last digit" in text and "Put {seed} into train.command" in text
    assert "The metric does not move: half of the budget gave the same" in text


@pytest.mark.parametrize(("more", "says"), [
    (("--seeds", "2"), "2 seeds say next to nothing of how far runs differ. Give --seeds 3 or more"),
    (("--ideas", "IDEAS"), "--ideas IDEAS gives a folder of cards, and nothing says which of them to measure."),
    (("--ideas", "IDEAS", "--cards", "nosuch"), "There is no card 'nosuch'. Choose of: another-salt, "),
    (("--ideas", "IDEAS", "--cards", "elsewhere"),
     "Card elsewhere is for preset large, not for none. Leave it out of --cards"),
    (("--long", "30"), "--long 30 is not more than the 30 of a run."),
    (("--long", "60"), "--long compares the order of 4 arms or more at two budgets, and the start with its patches "
                       "makes 1. Name 3 cards or more with --cards."),
])
def test_what_the_owner_must_mend_is_one_line_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                             more: tuple[str, ...], says: str) -> None:
    tiny.write_tiny_target(tmp_path / "repo")
    cards(tmp_path / "ideas")
    place = str(tmp_path / "ideas")
    assert edge(["calibrate", str(tmp_path / "repo"), "--runs", str(tmp_path / "runs"),
                 *(word.replace("IDEAS", place) for word in more)]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith(f"ratchet: {says.replace('IDEAS', place)}")
    assert not any("done in" in line for line in told)


def test_a_target_that_crashes_or_decides_its_own_length_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                                ) -> None:
    config = "[train]\ncommand = 'python train.py'\n[evaluate]\npattern = 'loss: ([0-9.]+)'\n"
    repo = repository(tmp_path / "repo", "raise ValueError('no data')\n", config)
    assert edge(["calibrate", str(repo), "--runs", str(tmp_path / "runs")]) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("ratchet: The target itself fails to train on seed 1 (crash): ")
    assert "ValueError: no data" in told[-1] and told[-1].endswith("Mend it and commit, then calibrate again.")
    assert edge(["calibrate", str(repo), "--runs", str(tmp_path / "runs"), "--steps", "5"]) == 1
    assert "decides how long a run takes, so --steps says nothing. Leave it out" in capsys.readouterr().err
