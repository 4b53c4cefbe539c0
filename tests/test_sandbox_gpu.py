"""One GPU in the box: seen, alone, usable, compiled for, and measured. Skips where there is none."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from sandbox_world import GOOD, World

from sandbox import gpu
from sandbox.box import explain
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


@pytest.mark.parametrize("level", [3, 2, 0])
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
