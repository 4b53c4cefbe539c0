"""The benches, on a tiny served target: real git, real boxes, real supervisors; one slow test on the default target."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sandbox_world import FAKE, SERVE, alive

from agent import ideas, power
from agent.bench import command, machine, weigh
from agent.cli import edge
from agent.errors import UserError
from agent.git_trees import import_folder
from agent.ground import Ground, Wanted, open_ground
from sandbox import box

TRAIN = """
from fake import *
from levels import BLUNT, MIX
PAUSE = 0.01
sock, table = train(on_batch=lambda step: time.sleep(PAUSE))
for row in table:
    shares = [math.exp(BLUNT * value) for value in row]
    row[:] = [math.log((1 - MIX) * share / sum(shares) + MIX / VOCAB) for share in shares]
data = save(table)
size = int.from_bytes(data[:8], "little")
entry = json.loads(data[8:8 + size])["table"]
nothing = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
header = json.dumps({"unembedding.weight": entry, "blocks.0.w": nothing, "blocks.1.w": nothing}).encode()
send(sock, b"W", len(header).to_bytes(8, "little") + header + data[8 + size:])
"""
LEVELS = "BLUNT = 0.5\nMIX = 0.5\n"
PREPARE = """
import json, sys
from pathlib import Path
import numpy as np
out = Path(sys.argv[1])
out.mkdir()
for seed, (name, count) in enumerate([("train", 20000), ("val", 3000), ("confirm", 3000), ("final", 3000)]):
    draw = np.random.default_rng(seed)
    tokens = [0]
    for near, jump in zip(draw.random(count) < 0.7, draw.integers(0, 32, count)):
        tokens.append((tokens[-1] + 1) % 32 if near else int(jump))
    np.array(tokens[1:], "<u2").tofile(out / f"{name}.bin")
np.save(out / "token_bytes.npy", np.ones(32, np.uint8))
(out / "meta.json").write_text(json.dumps({"corpus": "chain", "vocab": 32, "rows": 4, "sequence": 24, "hidden": []}))
"""
CONFIG = """
[train]
command = "python train.py"
served = true
[data]
prepare = "python prepare.py {out}"
[evaluate]
tier = "sealed"
command = "python serve.py"
rows = 64
audit = 16
[source]
editable = ["levels.py"]
protected = ["train.py", "serve.py", "fake.py", "prepare.py"]
[budget]
unit = "charged_steps"
amount = 8
[limits]
wall_seconds = 60
memory_mb = 512
weights_mb = 1
"""
CARDS = {"sharper": ("BLUNT = 0.5", "BLUNT = 1.0"), "unmixed": ("MIX = 0.5", "MIX = 0.05"),
         "blunter": ("BLUNT = 0.5", "BLUNT = 0.25"), "broken": ("MIX = 0.5", "MIX = 1 / 0")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the target in ``repo`` (a git repository), cards in ``ideas`` and runs in ``runs``."""
    folder = tmp_path_factory.mktemp("bench")
    target, book = folder / "plain", folder / "ideas"
    target.mkdir()
    book.mkdir()
    for name, text in {"fake.py": FAKE, "train.py": TRAIN, "levels.py": LEVELS, "serve.py": SERVE,
                       "prepare.py": PREPARE, "ratchet.toml": CONFIG}.items():
        (target / name).write_text(text)
    for name, (search, replace) in CARDS.items():
        (book / f"{name}.toml").write_text(
            f'title = "{name}"\nmechanism = "as named"\nreference = "none"\n'
            f'[[edits]]\npath = "levels.py"\nsearch = "{search}"\nreplace = "{replace}"\n')
    import_folder(target, folder / "repo.git")
    subprocess.run(["git", "clone", "-q", "-b", "accepted", str(folder / "repo.git"), str(folder / "repo")], check=True)
    return folder


def arguments(world: Path, *more: str) -> list[str]:
    return ["--repo", str(world / "repo"), "--runs", str(world / "runs"), *more]


def measure(world: Path, capsys: pytest.CaptureFixture[str], name: str, *more: str) -> dict[str, Any]:
    """The JSON object of a bench on the tiny target; it leaves nothing but prepared data."""
    assert command.run(name, True, arguments(world, *more)) == 0
    assert [path.name for path in (world / "runs").iterdir()] == [".data"]
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == name
    return dict(found)


def ground(world: Path, slots: int, say: Any = lambda line: None) -> Any:
    options = command.parser("mfu", command.BENCHES["mfu"]).parse_args(arguments(world))
    return open_ground(options, "test", say, slots)


# ---------------------------------------------------------------------------------------------------- names, options

def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        command.run("speed", False, [])
    for name, known in command.BENCHES.items():
        assert f"{name}: {known.about}" in str(caught.value)


@pytest.mark.parametrize(("name", "options", "says"), [
    ("effects", [], "--cards"),
    ("effects", ["--cards", "a", "--seeds", "0"], "'0' is no number from 1 on"),
    ("effects", ["--cards", "a", "--together", "--apart"], "not allowed"),
    ("noise", ["--seed", "3"], "--seed"),
    ("box", ["--repo", "x"], "--repo"),
    ("box", ["--level", "7"], "--level"),
])
def test_wrong_options_are_one_line_with_the_usage(name: str, options: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        command.run(name, False, options)
    assert says in caught.value.problem and caught.value.mend.startswith(f"usage: ratchet bench {name} ")
    assert "\n" not in str(caught.value)


def test_the_command_line_hands_options_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edge(["bench", "box", "--tries", "1", "--level=0", "--json", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tries"] == 1 and [row["level"] for row in found["levels"]] == [0]
    assert edge(["bench", "box", "--tries", "none"]) == 1
    assert capsys.readouterr().err.startswith("ratchet: ratchet bench box: argument --tries: 'none' is no number")


def test_an_unknown_card_and_a_missing_repo_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no card 'nosuch'\. Choose of: blunter, broken, sharper, unmixed"):
        command.run("effects", False, arguments(world, "--ideas", str(world / "ideas"), "--cards", "sharper,nosuch"))
    with pytest.raises(UserError, match="does not exist"):
        command.run("noise", False, ["--repo", str(tmp_path / "gone"), "--runs", str(tmp_path / "runs")])
    assert list((tmp_path / "runs").iterdir()) == []


# --------------------------------------------------------------------------------------------------------- statistics

def test_paired_is_the_textbook_statistic() -> None:
    found = power.paired([1.0, 2.0, 3.0], [0.9, 1.7, 2.8])
    assert found.n == 3
    assert (found.effect, found.sd, found.error) == pytest.approx((-0.2, 0.1, 0.1 / math.sqrt(3)))
    assert found.correlation == pytest.approx(statistics.correlation([1, 2, 3], [0.9, 1.7, 2.8]))
    assert power.paired([1.0, 1.0], [0.5, 0.7]).correlation is None
    alone = power.paired([1.0], [0.5])
    assert (alone.effect, alone.sd, alone.error, alone.correlation) == (-0.5, None, None, None)
    assert power.paired([], []).effect is None


# ------------------------------------------------------------------------------------------------------------ effects

def test_effects_of_cards_and_of_their_sum(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(world, capsys, "effects", "--ideas", str(world / "ideas"), "--cards", "sharper,unmixed",
                    "--seeds", "2", "--slots", "2", "--first-seed", "5")
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == ["sharper", "unmixed", "together"]
    assert (found["seeds"], found["steps"], found["split"], found["slots"]) == ([5, 6], 8, "final", 2)
    assert found["level"] == int(box.probe()) and found["ruler"]
    for row in rows.values():
        assert row["n"] == 2 and row["faults"] == [] and row["wall_seconds"] > 0 and row["step_cost"] > 0
        assert list(row["values"]) == ["val", "confirm", "final"]
        pairs = list(zip(found["start"]["values"]["final"], row["values"]["final"], strict=True))
        assert row["effect"] == pytest.approx(statistics.fmean(b - a for a, b in pairs))
        assert row["se"] == pytest.approx(row["sd"] / math.sqrt(2))
    assert rows["sharper"]["effect"] < 0 and rows["unmixed"]["effect"] < 0
    assert rows["together"]["effect"] < min(rows["sharper"]["effect"], rows["unmixed"]["effect"])
    assert found["start"]["seed_sd"] > 0


def test_a_variant_that_crashes_is_a_fault_and_no_pair(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("effects", False, arguments(world, "--ideas", str(world / "ideas"), "--cards", "broken",
                                                 "--seeds", "1", "--steps", "2", "--split", "val")) == 0
    printed = capsys.readouterr()
    assert "broken failed on seed 1 (crash): " in printed.out and "ZeroDivisionError" in printed.out
    row = next(line for line in printed.out.splitlines() if line.startswith("│ broken"))
    assert row.split("│")[2].strip() == "-" and row.split("│")[6].strip() == "0"
    assert "2/2 broken seed 1: crash" in printed.err or "1/2 broken seed 1: crash" in printed.err


def test_cards_that_exclude_each_other_have_no_sum(world: Path) -> None:
    both = ["--ideas", str(world / "ideas"), "--cards", "sharper,blunter", "--seeds", "1"]
    with pytest.raises(UserError, match=r"Card blunter does not apply on the cards before it.*--apart"):
        command.run("effects", True, arguments(world, *both, "--together"))
    with ground(world, 1) as place:
        book = ideas.cards_of(["sharper", "blunter"], world / "ideas")
        apart = {place.variant([card], place.start) for card in book}
        assert len(apart) == 2 and place.start not in apart


# ---------------------------------------------------------------------------------------------------- weigh and bank

@pytest.mark.parametrize("cards", [1, 3, 7, 10, 15])
def test_a_design_has_each_card_on_in_half_of_its_rows_and_none_in_the_first(cards: int) -> None:
    rows = weigh.design(cards)
    assert len(rows) > cards and not any(rows[0])
    for one in range(cards):
        assert sum(row[one] for row in rows) == len(rows) / 2
        assert all(sum(row[one] == row[other] for row in rows) == len(rows) / 2 for other in range(one))


def test_a_card_weighed_alone_is_worth_what_it_is_worth_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(world, capsys, "weigh", "--ideas", str(world / "ideas"), "--cards", "sharper", "--seeds", "2",
                     "--weighed", "2")
    card = found["cards"][0]
    assert card["weighed"] == pytest.approx(card["alone_same_seeds"], abs=1e-6) and card["alone"] < 0
    assert found["same_seed_sd"] < 1e-6 and found["rms_gap"] < 1e-6


def test_a_bank_holds_every_arm_on_every_seed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = world / "bank.json"
    measure(world, capsys, "bank", "--ideas", str(world / "ideas"), "--cards", "sharper,broken", "--seeds", "2",
             "--out", str(out))
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert {name: arm["kind"] for name, arm in kept["arms"].items()} == {
        "start": "start", "sharper": "effect", "broken": "effect"}
    for name, arm in kept["arms"].items():
        assert [run["seed"] for run in arm["runs"]] == kept["seeds"] and len(kept["seeds"]) == 2
        assert all(run.get("fault") == "crash" if name == "broken" else set(run["scores"]) >= {"val", "confirm"}
                   for run in arm["runs"])


# -------------------------------------------------------------------------------------------------- noise and startup

def test_noise_of_a_target_that_repeats_itself(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(world, capsys, "noise", "--seeds", "2", "--repeats", "2", "--steps", "4")
    assert found["same_weights"] is True and found["same_seed_sd"] < 1e-6 and found["repeats"] == 2
    assert found["start"]["seed_sd"] > 1e-4 and len(found["start"]["values"]["val"]) == 2
    assert found["train_seconds"] >= 4 * 0.01 and found["evaluate_seconds"] > 0
    assert found["wall_seconds"] >= found["startup_seconds"] + found["train_seconds"]


def test_startup_tells_the_parts(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(world, capsys, "startup", "--tries", "5", "--module", "asyncio")
    assert 0 < found["interpreter_seconds"] < found["import_seconds"]
    assert found["rest_seconds"] == pytest.approx(found["first_request_seconds"] - found["import_seconds"])
    assert 0 < found["plain_ms"] < 1000 * found["whole_seconds"] and found["box_ms"] > 0
    with pytest.raises(UserError, match=r"python -c import nosuchmodule failed in a box of level \d: ModuleNotFound"):
        command.run("startup", True, arguments(world, "--tries", "1", "--module", "nosuchmodule"))


def test_starts_compare_cold_and_warm(world: Path) -> None:
    with ground(world, slots=1) as place:
        config = place.site.config
        train = config.train.model_copy(update={"warm": ["statistics", "json"]})
        place.site = dataclasses.replace(place.site, config=config.model_copy(update={"train": train}))
        found = machine.starts(place, box.probe(1), 1)
        assert found["same_weights"] and (found["cold"]["boxes"], found["warm"]["boxes"]) == (0, 2)
        assert found["warm"]["startup_cpu_seconds"] < found["cold"]["startup_cpu_seconds"]
        assert 0 < found["warm"]["first_batch_seconds"] < found["warm"]["first_step_seconds"] < found["warm"]["seconds"]
        assert found["waiting"]["boxes"] == 2 and 0 < found["waiting"]["memory_mb"] < 200
        assert not alive(str(world / "runs"))


# --------------------------------------------------------------------------------------------------------- box and mfu

def test_box_measures_the_levels_that_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("box", True, ["--tries", "2", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    levels = [row["level"] for row in found["levels"]]
    assert levels[0] == 0 and levels[-1] == int(box.probe()) and levels == sorted(levels)
    assert not set(levels) & {int(level) for level in found["refused"]}
    for row in found["levels"]:
        assert 0 < row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"] < 5000
    assert list(tmp_path.iterdir()) == []


def test_mfu_without_a_gpu_says_so(world: Path) -> None:
    if machine.gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        command.run("mfu", False, arguments(world))


def test_model_flops_are_counted_from_the_weights() -> None:
    width, vocab, layers = 8, 50, 3
    shapes = {"embedding.weight": [vocab, width], "value_embeddings.1.weight": [vocab, width],
              "unembedding.weight": [vocab, width], "residual_weights": [layers]}
    for i in range(layers):
        shapes |= {f"blocks.{i}.attention.qkv.weight": [3 * width, width], f"blocks.{i}.mlp.fc.weight": [32, width]}
    size = machine.model_size(shapes)
    assert size == (vocab * width + layers * (3 * width * width + 32 * width), layers, width)
    assert machine.flops_per_token(*size, sequence=16) == 6 * size[0] + 12 * layers * width * 16
    with pytest.raises(UserError, match=r"blocks\.N"):
        machine.model_size({"table": [4, 4]})


def test_utilisation_takes_the_difference_of_two_runs(world: Path) -> None:
    place: Ground
    with ground(world, 1) as place:
        found = machine.utilisation(place, 2, 302, 3, peak_tflops=1e-6)  # far above what a busy machine adds
        with pytest.raises(UserError, match="must have more steps"):
            machine.utilisation(place, 20, 20, 1, 989.0)
    assert (found["matrix_parameters"], found["layers"], found["width"], found["sequence"]) == (32 * 32, 2, 32, 24)
    assert found["tokens_per_step"] == 4 * 24 and 0 < found["step_ms"] < 200
    assert found["flops_per_token"] == 6 * 1024 + 12 * 2 * 32 * 24
    assert found["mfu"] == pytest.approx(96 / (found["step_ms"] / 1000) * found["flops_per_token"] / 1e6)


# --------------------------------------------------------------------------------------------------------- the ground

def test_an_interrupt_leaves_no_job_behind(world: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ground(world, 2, interrupt) as place:
        marker = str(place.site.folder)
        place.measure([Wanted(place.start, 1, 1, "short"), Wanted(place.start, 2, 3000, "long")])
    assert not Path(marker).exists() and alive(marker) == []


def test_a_machine_that_fails_is_blamed_after_three_tries(world: Path) -> None:
    told: list[str] = []
    with ground(world, 1, told.append) as place:
        place.site = dataclasses.replace(place.site, devices=("cuda:63",))
        with pytest.raises(UserError, match="The machine failed 3 times: nvidia-smi finds no GPU 63"):
            place.measure([Wanted(place.start, 1, 1, "start")])
        jobs = [path for path in (place.site.folder / "jobs").iterdir() if not path.name.startswith(".ahead-")]
        assert len(jobs) == 3 and told == []


def test_uncommitted_changes_are_told_and_not_measured(world: Path) -> None:
    told: list[str] = []
    levels = world / "repo" / "levels.py"
    before = levels.read_text()
    levels.write_text("BLUNT = nonsense\n")
    try:
        with ground(world, 1, told.append) as place:
            assert (place.site.source(place.start) / "levels.py").read_text() == LEVELS
    finally:
        levels.write_text(before)
    assert any("uncommitted changes" in line and place.start[:12] in line for line in told)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_warm_start_of_the_default_target_is_quick_and_the_same(tmp_path: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("startup", True, ["--preset", "cpu", "--tries", "1", "--runs", str(tmp_path)]) == 0
    levels = json.loads(capsys.readouterr().out)["levels"]
    assert levels and all(found["same_weights"] and found["warm"]["boxes"] == 2 for found in levels)
    assert max(found["warm"]["startup_cpu_seconds"] for found in levels) < 0.5
    assert min(found["cold"]["startup_cpu_seconds"] for found in levels) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_effects_on_the_default_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The card of a planted oversight, by the packaged names, through the whole default target."""
    assert command.run("effects", True, ["--preset", "cpu", "--cards", "larger-unembedding-rate", "--seeds", "1",
                                       "--steps", "40", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"][0]["effect"] < 0 and found["start"]["values"]["final"][0] < 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_audit_finds_cheats_on_the_default_target_and_leaves_honest_models_alone(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run("audit", True, ["--preset", "cpu", "--cheats", "selective,weak,state", "--seeds", "1", "--steps",
                                     "30", "--honest", "3", "--runs", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: row["found"] for name, row in found["cheats"].items()} == {"selective": 1, "weak": 1, "state": 1}
    assert all(row["gain"] < 0 for row in found["cheats"].values()), "a cheat that gains nothing proves nothing"
    assert found["honest"]["alarms"] == 0 and 0 < found["honest"]["widest"] < 1e-4
