"""One GPU in the box: seen, alone, usable, compiled for, and measured. Skips where there is none."""

from __future__ import annotations

import os
import signal
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from sandbox_world import GOOD, World

from sandbox import gpu
from sandbox.box import explain
from sandbox.engine import LocalEngine
from sandbox.job import Limits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu.find(0) is None, reason="nvidia-smi finds no GPU")]

LOOK = """
from fake import *
import torch
print("gpus", torch.cuda.device_count(), torch.cuda.get_device_name(0))
x = torch.randn(2048, 2048, device="cuda:0", dtype=torch.bfloat16)
print("matmul", bool((x @ x).isfinite().all()))
print("compiled", torch.compile(lambda y: torch.nn.functional.gelu(y) * 2)(x).shape)
held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0").fill_(1)
time.sleep(4)
"""


@pytest.mark.parametrize("level", [3, 2, 1, 0])
def test_torch_computes_and_compiles_on_its_one_gpu(tmp_path: Path, level: int) -> None:
    if explain(level).level != level:
        pytest.skip(f"this machine cannot hold level {level}: {explain(level).refused}")
    try:
        metadata.version("torch")
    except metadata.PackageNotFoundError:
        pytest.skip("torch is not installed")
    world = World(tmp_path)
    limits = Limits(wall_seconds=240, memory_mb=32768, scratch_mb=4096)
    number = next(index for index in reversed(range(8)) if gpu.find(index) is not None)
    result = world.run(world.job(world.source(LOOK + GOOD), device=f"cuda:{number}", max_level=level, limits=limits))
    text = world.log()
    assert result.fault is None, (result.message, text)
    found = gpu.find(number)
    assert found is not None and f"gpus 1 {found.name}" in text and "matmul True" in text and "compiled" in text
    assert result.gpu_memory_mb > 1024 and result.fingerprint["driver"] == found.driver
    assert 0 < result.charge_seconds <= result.seconds

HOLD = """
from fake import *
import subprocess, sys, torch
compiled = torch.compile(lambda y: torch.nn.functional.gelu(y) * 2)
compiled(torch.randn(512, 512, device="cuda:0"))
held = torch.empty(4 << 30, dtype=torch.uint8, device="cuda:0").fill_(1)
subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
print("holding", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(("level", "how"), [(3, "stop"), (3, "kill"), (2, "stop"), (1, "stop"), (0, "stop")])
def test_nothing_of_a_killed_job_is_left_after_five_seconds(tmp_path: Path, level: int, how: str) -> None:
    """``kill``: the supervisor itself dies by SIGKILL, and the box with it."""
    if explain(level).level != level:
        pytest.skip(f"this machine cannot hold level {level}: {explain(level).refused}")
    card = gpu.find(0)
    assert card is not None
    memory = gpu.memory_reader(card)
    before, old = memory(), set(psutil.pids())
    world, engine, folder = World(tmp_path), LocalEngine(), tmp_path / "killed"
    limits = Limits(wall_seconds=240, memory_mb=32768, scratch_mb=4096)
    engine.start(folder, world.job(world.source(HOLD), device="cuda:0", max_level=level, limits=limits))
    deadline = time.monotonic() + 120
    while memory() < before + 4000 and time.monotonic() < deadline and engine.alive(folder):
        time.sleep(0.1)
    assert memory() > before + 4000, (folder / "log.txt").read_text(encoding="utf-8")
    began = time.monotonic()
    if how == "stop":
        engine.stop(folder)
    else:
        os.kill(int((folder / "supervisor.pid").read_text(encoding="ascii").split()[0]), signal.SIGKILL)
    while time.monotonic() < began + 5 and (_left(old) or memory() > before + 8):
        time.sleep(0.05)
    print(f"level {level}, {how}: clean {time.monotonic() - began:.2f} s after the kill")
    assert _left(old) == []
    assert memory() <= before + 8


def _left(old: set[int]) -> list[str]:
    """Command lines of processes that began after ``old`` was taken and belong to the job: it sleeps or compiles. The
    fork server belongs to this process, and waits for its next job."""
    found = []
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        words = process.info["cmdline"] or []
        line = " ".join(words)
        ours = process.info["ppid"] == os.getpid() and words[3:4] == ["sandbox.forkserver"]
        if process.info["pid"] not in old and ("python" in line or "bwrap" in line) and not ours:
            found.append(line)
    return found
