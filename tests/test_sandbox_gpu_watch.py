"""Whether a GPU is fit to measure on: rules on an NVML-shaped fake, and whole jobs whose driver is that fake."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import gpu_watch
from sandbox.engine import LocalEngine
from sandbox.gpu import Gpu
from sandbox.job import Evaluation, Job, Result
from tests.fake_nvml import FakeNvml, change, seen

CARD, OTHER = Gpu(0, "GPU-0", 0, "NVIDIA Fake", "550.1"), Gpu(1, "GPU-1", 1, "NVIDIA Fake", "550.1")
MINE, STRANGER, UNKNOWN = 100, 200, 300


def ours(pid: int) -> bool | None:
    return {MINE: True, STRANGER: False}.get(pid)


def watch(nvml: FakeNvml, shared: bool = False, *cards: Gpu) -> gpu_watch.Watch:
    return gpu_watch.Watch(cards or (CARD,), nvml, ours, shared)


def looked(nvml: FakeNvml, looks: int = 5, shared: bool = False) -> str:
    """The complaint after some looks and the last one."""
    found = watch(nvml, shared)
    for _ in range(looks):
        found.look()
    return found.end()


def fake(**state: Any) -> FakeNvml:
    return FakeNvml(**{"GPU-0": state})


def test_a_gpu_at_full_load_is_fit_and_its_use_is_known() -> None:
    nvml = fake(busy=88, clock=1755, reasons=4, pids=[MINE], memory_mb=5000)
    found = watch(nvml)
    for _ in range(4):
        found.look()
    assert found.end() == "" and found.busy == pytest.approx(0.88)
    assert (found.clock_mhz, found.memory_mb) == (1755, 5000)


def test_an_idle_clock_does_not_count() -> None:
    nvml = fake(busy=0, clock=210)
    found = watch(nvml)
    found.look()
    nvml.cards["GPU-0"].update(busy=97, clock=1980)
    assert found.end() == "" and found.clock_mhz == 1980 and found.busy == pytest.approx(0.485)


def test_a_stranger_is_told_from_a_passer_by() -> None:
    nvml = fake(pids=[MINE])
    found = watch(nvml)
    for pids in ([MINE, STRANGER], [MINE], [STRANGER], [MINE]):
        nvml.cards["GPU-0"]["pids"] = pids
        found.look()
        assert found.complaint == ""
    nvml.cards["GPU-0"]["pids"] = [MINE, STRANGER]
    found.look()
    found.look()
    assert found.complaint.startswith("GPU 0: it is shared with a stranger (pid 200")


@pytest.mark.parametrize(("before", "shared", "seen"), [([UNKNOWN], False, True), ([], False, False),
                                                        ([UNKNOWN], True, False)])
def test_where_pids_cannot_be_looked_up_a_stranger_was_there_before(before: list[int], shared: bool, seen: bool
                                                                    ) -> None:
    nvml = fake(pids=before)
    found = watch(nvml, shared)
    nvml.cards["GPU-0"]["pids"] = [UNKNOWN]
    for _ in range(3):
        found.look()
    assert ("stranger" in found.end()) is seen


@pytest.mark.parametrize(("state", "told"), [
    ({"xids": [79]}, "Xid 79"), ({"xids": [31, 48]}, "Xid 48"), ({"xids": [13, 31, 43, 45, 109]}, ""),
    ({"error": 15}, "fallen off the bus"), ({"error": 16}, "must be reset"), ({"error": 999}, ""),
    ({"unsupported": ["busy", "clock", "reasons", "processes", "events", "memory"]}, ""),
    ({"reasons": 0x8}, "slowed down (HwSlowdown)"), ({"reasons": 0x20}, "SwThermalSlowdown"),
    ({"reasons": 0x1 | 0x2 | 0x4 | 0x10 | 0x100}, "")])
def test_what_voids_a_run(state: dict[str, Any], told: str) -> None:
    nvml = fake()
    found = watch(nvml)
    nvml.cards["GPU-0"].update(state)
    for _ in range(5):
        found.look()
    complaint = found.end()
    assert told in complaint and bool(complaint) is bool(told)


def test_a_moment_of_heat_is_forgiven_and_a_fifth_of_the_time_is_not() -> None:
    for hot, told in ((2, False), (3, False), (4, True)):
        nvml = fake()
        found = watch(nvml)
        for number in range(19):
            nvml.cards["GPU-0"]["reasons"] = 0x40 if number < hot else 4
            found.look()
        assert ("HwThermalSlowdown" in found.end()) is told, hot


def test_a_gpu_that_is_gone_at_the_start_is_said() -> None:
    assert "fallen off the bus" in watch(fake(error=15)).complaint
    assert "does not find it" in gpu_watch.Watch((OTHER,), fake(), ours).complaint


def test_every_gpu_of_a_group_is_looked_at() -> None:
    nvml = FakeNvml(**{"GPU-0": {"memory_mb": 1000, "busy": 100}, "GPU-1": {"memory_mb": 500, "busy": 50}})
    found = watch(nvml, False, CARD, OTHER)
    found.look()
    assert found.memory_mb == 1500 and found.busy == pytest.approx(0.75)
    nvml.cards["GPU-1"]["xids"] = [79]
    assert found.end() == "GPU 1: the driver reported Xid 79"


def test_a_process_belongs_to_the_campaign_whose_jobs_folder_its_supervisor_names(tmp_path: Path) -> None:
    if not gpu_watch._initial_namespace():
        assert gpu_watch.belongs(1, tmp_path) is None
        pytest.skip("this machine's PIDs are those of a container")
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", sleeper, "-m", "sandbox.supervisor", str(tmp_path / "jobs/a")])
    try:
        deadline = time.monotonic() + 20
        while not (below := gpu_watch.process.children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert gpu_watch.belongs(below[0], tmp_path / "jobs") is True
        assert gpu_watch.belongs(below[0], tmp_path / "other") is False
    finally:
        for pid in gpu_watch.process.children(parent.pid):
            gpu_watch.process.send_kill([pid])
        parent.kill()
        parent.wait()


# -------------------------------------------------------------------------------- whole jobs with the fake as driver


TRAIN = """
import os, sys, time
print("visible", os.environ["CUDA_VISIBLE_DEVICES"])
time.sleep(float(sys.argv[1]))
print("loss: 1.5")
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with two GPUs, as far as nvidia-smi and NVML tell. The state's file."""
    with seen(tmp_path / "driver", monkeypatch, **{"GPU-0": {}, "GPU-1": {}}) as state:
        yield state


def run(tmp_path: Path, device: str, seconds: float, meanwhile: Any = None) -> Result:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "train.py").write_text(TRAIN, encoding="utf-8")
    folder, engine = tmp_path / "jobs" / "one", LocalEngine()
    engine.start(folder, Job("one", str(source), ("python", "train.py", str(seconds)), 1, 10, device=device,
                             evaluation=Evaluation("reported", pattern=r"loss: (\S+)"), max_level=0))
    begun = time.monotonic()
    while (result := engine.poll(folder)) is None:
        assert time.monotonic() < begun + 60
        if meanwhile is not None and (folder / "log.txt").exists() and (folder / "log.txt").read_text():
            meanwhile()
            meanwhile = None
        time.sleep(0.05)
    engine.close()
    return result


def test_a_group_of_gpus_is_one_device(tmp_path: Path, driver: Path) -> None:
    change(driver, **{"GPU-0": {"busy": 60}, "GPU-1": {"busy": 80}})
    result = run(tmp_path, "cuda:0+1", 2.5)
    assert result.fault is None, result.message
    assert "visible GPU-0,GPU-1" in (tmp_path / "jobs/one/log.txt").read_text(encoding="utf-8")
    assert result.fingerprint["device"] == "2 x NVIDIA Fake" and result.gpu_busy == pytest.approx(0.7)
    assert result.gpu_memory_mb == 200 and result.gpu_clock_mhz == 1980


def test_a_group_with_a_gpu_that_is_not_there_is_said(tmp_path: Path, driver: Path) -> None:
    result = run(tmp_path, "cuda:1+2", 0)
    assert result.fault == "infra" and "finds no GPU 2" in result.message


def test_a_gpu_that_is_lost_ends_its_run_at_once_as_void(tmp_path: Path, driver: Path) -> None:
    begun = time.monotonic()
    result = run(tmp_path, "cuda:0", 50, lambda: change(driver, **{"GPU-0": {"error": 15}, "GPU-1": {}}))
    assert time.monotonic() - begun < 40
    assert result.fault == "infra" and result.device_fault == "GPU 0: it is lost (fallen off the bus)"


def test_an_xid_voids_even_a_run_that_ended_well(tmp_path: Path, driver: Path) -> None:
    result = run(tmp_path, "cuda:0", 0.5, lambda: change(driver, **{"GPU-0": {"xids": [79]}, "GPU-1": {}}))
    assert result.fault == "infra" and "Xid 79" in result.device_fault
