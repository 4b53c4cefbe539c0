"""Control groups: found by the mounts, capped, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandbox_world import GOOD, World, alive

from sandbox import cgroup, process
from sandbox.job import Limits

needs_group = pytest.mark.skipif(not cgroup.available(), reason="no control group can be made here")

HYBRID = """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
DOCKER_1 = "7 1 0:32 /docker/ab /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n" \
           "8 1 0:33 /docker/ab /sys/fs/cgroup/cpu,pids rw - cgroup cgroup rw,cpu,pids\n"


def left_behind() -> list[Path]:
    """Groups whose supervisor is gone; others may run on this machine meanwhile."""
    found = [folder for parent in cgroup.available() for folder in parent.glob(f"{cgroup.PREFIX}*")]
    return [folder for folder in found if not process.running(*map(int, folder.name.split("-")[2:4]))]


@pytest.mark.parametrize(("mounts", "own", "expected"), [
    (HYBRID, "8:pids:/\n4:memory:/a/b\n0::/\n", ("/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/pids")),
    (DOCKER_1, "8:cpu,pids:/docker/ab\n4:memory:/docker/ab\n", ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/cpu,pids")),
    (HYBRID, "4:memory:/a/b\n0::/\n", ()),
    ("", "0::/\n", ()),
])
def test_version_1_is_found_by_its_mounts(mounts: str, own: str, expected: tuple[str, ...]) -> None:
    assert cgroup.parents(mounts, own) == tuple(map(Path, expected))


def test_version_2_is_the_nearest_ancestor_that_hands_the_controllers_on(tmp_path: Path) -> None:
    scope = tmp_path / "user.slice" / "session.scope"
    scope.mkdir(parents=True)
    for folder, controllers in ((tmp_path, "cpu memory pids"), (scope.parent, "memory pids"), (scope, "")):
        (folder / "cgroup.procs").touch()
        (folder / "cgroup.subtree_control").write_text(controllers, encoding="ascii")
    mounts = f"41 31 0:38 / {tmp_path} rw,relatime - cgroup2 cgroup2 rw\n"
    assert cgroup.parents(mounts, "0::/user.slice/session.scope\n") == (scope.parent,)
    (scope.parent / "cgroup.subtree_control").write_text("pids", encoding="ascii")
    assert cgroup.parents(mounts, "0::/user.slice/session.scope\n") == (tmp_path,)


@needs_group
def test_tasks_and_memory_are_capped_by_the_kernel() -> None:
    group = cgroup.create(cgroup.Limit(64 << 20, 20))
    assert group is not None
    bomb = ("import os, time\ncount = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(30)\n"
            "        count += 1\nexcept OSError: print(count, flush=True)\n")
    done = subprocess.Popen([sys.executable, "-c", bomb], preexec_fn=group.enter, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None and done.stdout.readline() == "19\n" and len(group.pids()) >= 19
    group.kill()
    done.wait(10)
    hog = subprocess.run([sys.executable, "-c", "x = bytearray(b'x') * (200 << 20)"], preexec_fn=group.enter)
    assert hog.returncode == -signal.SIGKILL and group.out_of_memory()
    assert group.remove() and not any(folder.exists() for folder in group.folders)
    done.stdout.close()


@needs_group
@pytest.mark.parametrize("level", [3, 1])
def test_a_hog_faster_than_the_poll_is_out_of_memory_by_the_kernel(tmp_path: Path, level: int) -> None:
    world = World(tmp_path)
    hog = "x = bytearray(b'x') * (1 << 30)\nimport time; time.sleep(5)\n"
    result = world.run(world.job(world.source(hog), max_level=level,
                                 limits=Limits(wall_seconds=20, memory_mb=64, scratch_mb=16)))
    assert (result.fault, result.level) == ("oom", level) and "64 MiB" in result.message
    assert result.peak_memory_mb < 512 and not left_behind()


@needs_group
@pytest.mark.parametrize("level", [3, 1])
def test_groups_go_with_their_boxes_and_those_of_a_killed_supervisor_with_the_next(tmp_path: Path, level: int) -> None:
    world = World(tmp_path)
    mark = f"mark{os.getpid()}x{level}"
    wait = ("import subprocess, sys, time\n"
            f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\ntime.sleep(60)\n")
    folder = world.job_folder(world.job(world.source(wait), max_level=level))
    supervisor = subprocess.Popen([sys.executable, "-m", "sandbox.supervisor", str(folder)])
    deadline = time.monotonic() + 20
    while not alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(mark)
    supervisor.kill()
    supervisor.wait()
    assert left_behind()
    following = world.job_folder(world.job(world.source(GOOD), max_level=level))
    subprocess.run([sys.executable, "-m", "sandbox.supervisor", str(following)], check=True, timeout=60)
    assert not left_behind() and not alive(mark)
