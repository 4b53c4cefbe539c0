"""Slots whose device was found unfit: rest, back-off, asked again, given up; and a whole campaign through it."""

from __future__ import annotations

import difflib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cli, config, rests, site, tiny
from agent.errors import UserError
from agent.ledger import events, replay
from agent.records import Result, Run, from_json
from agent.rests import FIRST, MOST, TRIES, Rests
from sandbox import gpu
from tests.fake_nvml import change, seen

RUN = Run("r", "pair", "t", 1, 10, "cuda:0", "jobs/r")
GOOD, VOID = Result("r", None), Result("r", "infra", "it broke", device_fault="GPU 0: it is lost")


class World:
    """A clock, and a device that is well or not."""

    def __init__(self) -> None:
        self.now, self.wrong, self.asked = 0.0, "", 0
        self.rests = Rests(self.ask, lambda: self.now)

    def ask(self, device: str) -> str:
        assert device == "cuda:0"
        self.asked += 1
        return self.wrong

    def free(self) -> bool:
        return not self.rests.rests("cuda:0")


def test_a_void_run_rests_its_device_alone_with_one_note() -> None:
    world = World()
    world.rests.heard(RUN, GOOD)
    assert world.free() and not world.rests.notes
    world.rests.heard(RUN, VOID)
    assert not world.free() and world.rests.any and not world.rests.rests("cuda:1")
    world.rests.heard(RUN, VOID)  # of a second job that was on it too
    (note,) = world.rests.notes
    assert "GPU 0: it is lost" in note and "void" in note


def test_it_is_asked_when_its_time_is_over_and_not_before() -> None:
    world = World()
    world.rests.heard(RUN, VOID)
    world.now = FIRST - 1
    assert not world.free() and world.asked == 0
    world.now = FIRST
    assert world.free() and world.asked == 1 and not world.rests.any
    world.rests.heard(RUN, GOOD)
    assert "works again after" in world.rests.notes[-1]
    world.rests.heard(RUN, VOID)
    assert "rests" in world.rests.notes[-1]  # a new matter, told anew


def test_what_is_still_wrong_doubles_the_rest_and_uses_up_no_tries() -> None:
    world = World()
    world.rests.heard(RUN, VOID)
    world.wrong, gaps, last = "GPU 0: a stranger", [], 0.0
    for _ in range(8):
        while not (asked := world.asked) or asked == len(gaps):
            world.now += 1
            world.free()
        gaps.append(world.now - last)
        last = world.now
    assert gaps == [FIRST, 60, 120, 240, 480, MOST, MOST, MOST]
    assert world.rests.given_up("cuda:0") == "" and world.rests.any


def test_a_device_that_spoils_every_run_is_given_up() -> None:
    world = World()
    for _ in range(TRIES):
        world.rests.heard(RUN, VOID)
        world.now += MOST
        world.free()
    assert world.rests.given_up("cuda:0") == "GPU 0: it is lost" and not world.free() and not world.rests.any
    assert [note.split(" ")[1:4] for note in world.rests.notes] == [["rests:", "GPU", "0:"], ["is", "given", "up"]]


def test_a_stopped_run_says_nothing_of_its_device() -> None:
    world = World()
    world.rests.heard(RUN, VOID)
    world.now = FIRST
    assert world.free()
    world.rests.heard(RUN, Result("r", "infra", "stopped"))
    assert len(world.rests.notes) == 1


# ------------------------------------------------------------------------------------------------------ a whole night


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rests, "FIRST", 0.3)
    with seen(tmp_path / "driver", monkeypatch, **{"GPU-0": {}, "GPU-1": {}}) as state:
        yield state


def patch_of(target: Path, place: Path) -> Path:
    edit = next(iter(tiny.KNOWN_FOREIGN.values())).edit
    text = (target / edit.path).read_text(encoding="utf-8")
    diff = difflib.unified_diff(text.splitlines(True), text.replace(edit.search, edit.replace).splitlines(True),
                                f"a/{edit.path}", f"b/{edit.path}")
    place.write_text("".join(diff), encoding="utf-8")
    return place


def test_a_gpu_that_is_lost_for_a_while_costs_time_and_no_verdict(tmp_path: Path, driver: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 0 is lost when the night begins and comes back once the night has said so."""
    tiny.write_foreign_target(tmp_path / "target")
    patch = patch_of(tmp_path / "target", tmp_path / "one.patch")
    change(driver, **{"GPU-0": {"error": 15}, "GPU-1": {}})
    ledger = tmp_path / "runs/night/ledger.jsonl"

    def mend() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (ledger.exists() and " rests: " in ledger.read_text("utf-8")):
            time.sleep(0.05)
        change(driver, **{"GPU-0": {}, "GPU-1": {}})

    mending = threading.Thread(target=mend)
    mending.start()
    monkeypatch.setattr(sys, "argv", ["ratchet", "try", str(patch), "--repo", "target", "--name", "night",
                                      "--unconfined"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    mending.join()
    state, _ = replay(ledger)
    void = [result for _, result in all_results(ledger) if result.device_fault]
    assert state.phase == "finished" and [a.verdict.outcome for a in state.attempts.values() if a.verdict] == [
        "accepted"]
    assert void and all(result.fault == "infra" for result in void)
    assert sum(" rests: " in note for note in state.notes) == 1 and any("works again" in n for n in state.notes)
    used = {run.device for run in state.runs.values() if not state.results[run.id].fault}
    assert used == {"cuda:0", "cuda:1"}
    for attempt in state.attempts.values():
        for pair in attempt.verdict.pairs if attempt.verdict else ():
            assert state.runs[pair.incumbent_run].device == state.runs[pair.candidate_run].device


def test_groups_and_shared_gpus_become_slots(
        tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "[train]\ncommand = 'torchrun --nproc-per-node {gpus} train.py'\n%s\n[evaluate]\npattern = 'x (.)'\n"

    def devices(line: str, slots: int | None = None) -> tuple[str, ...]:
        return site.find_devices(config.parse(base % line, "ratchet.toml"), slots)

    assert devices("") == ("cuda:0", "cuda:1")
    assert devices("gpus_per_run = 2") == ("cuda:0+1",)
    assert devices("jobs_per_gpu = 2") == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    assert devices("", 3) == ("cuda:0", "cuda:1", "cuda:0")
    with pytest.raises(UserError, match="this machine has 2"):
        devices("gpus_per_run = 3")
    with pytest.raises(UserError, match="exclude each other"):
        devices("gpus_per_run = 2\njobs_per_gpu = 2")
    for wanted, left in (("1", ("cuda:1",)), ("1,0", ("cuda:1", "cuda:0")), ("GPU-1", ("cuda:1",)),
                         ("0,7,1", ("cuda:0",)), ("GPU-,1", ("cpu",)), ("0,0,1", ("cuda:0",)), ("", ("cpu",)),
                         ("-1", ("cpu",))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
        assert devices("", len(left)) == left, wanted
    with pytest.raises(UserError, match="this machine has 1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        devices("gpus_per_run = 2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,0")
    with pytest.raises(UserError, match="MIG-1, a slice"):
        devices("")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    change(driver, **{"GPU-0": {"name": "NVIDIA A"}, "GPU-1": {"name": "NVIDIA B"}})
    gpu.find.cache_clear()
    with pytest.raises(UserError, match="NVIDIA A and NVIDIA B"):
        devices("gpus_per_run = 2")


def test_a_gpu_that_is_gone_is_passed_over_and_no_night_goes_to_the_cpu_unasked(
        driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(driver, **{"GPU-0": {"lost": True}, "GPU-1": {}})
    gpu.find.cache_clear()
    assert site.gpus() == (1,) and gpu.found()[1] == 1
    change(driver, **{"GPU-0": {"lost": True}, "GPU-1": {"lost": True}})
    gpu.find.cache_clear()
    with pytest.raises(UserError, match="lists 2 GPU"):
        site.gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert site.gpus() == ()


def all_results(ledger: Path) -> list[tuple[str, Result]]:
    """Every result that the ledger ever took, also of runs that were made again under the same name."""
    return [(time, from_json(Result, data)) for event, data, time in events(ledger) if event == "run_finished"]
