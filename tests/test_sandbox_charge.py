"""What a box is charged for: also the work of children that nobody waits for."""

from __future__ import annotations

from pathlib import Path

import pytest
from sandbox_world import GOOD, World

from sandbox import cgroup

HIDDEN = """
import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
def hide(step):
    reader, writer = os.pipe()
    if os.fork() == 0:
        burn(0.05)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
"""


@pytest.mark.skipif(not cgroup.available(), reason="no control group can be made here")
def test_children_that_nobody_waits_for_are_charged(tmp_path: Path) -> None:
    """Ten children of 50 ms each, born and gone between two readings of the process tree, and credited to no parent."""
    world = World(tmp_path)
    trainer = "from fake import *\n" + HIDDEN + GOOD.replace("train()", "train(on_batch=hide)")
    result = world.run(world.job(world.source(trainer), steps=11))
    if not result.level:
        pytest.skip("level 0 has no control group")
    assert result.fault is None and result.charge_seconds > 0.45, result
