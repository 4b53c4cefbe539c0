"""Every level under every kind of user that can have it: who the job is, and that each limit ends in its own fault."""

from __future__ import annotations

import re
import subprocess
import time
import uuid
from collections.abc import Iterator

import pytest
from sandbox_people import USER, WAYS, interpreter, run_as, world_of
from sandbox_world import GOOD, World, alive

from sandbox import box as boxes
from sandbox.job import Job, Limits, Result

CASES = [("root", 3), ("user", 2), ("root", 1), ("container", 1), ("user", 1)]


class Place:
    """A kind of user, a level, and a world."""

    def __init__(self, who: str, level: int, world: World) -> None:
        self.who, self.level, self.world = who, level, world

    def run(self, train: str, **limits: int) -> Result:
        wanted = {"wall_seconds": 20, "memory_mb": 512, "processes": 64, "log_mb": 1, "scratch_mb": 64} | limits
        job: Job = self.world.job(self.world.source(train), max_level=self.level, limits=Limits(**wanted))
        result = run_as(self.who, self.world, job)
        if result.level != self.level:
            pytest.skip(f"{self.who} cannot have level {self.level} here: {boxes.explain(self.level).refused}")
        return result


@pytest.fixture(params=CASES, ids=[f"{who}-{level}" for who, level in CASES])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    who, level = request.param
    with world_of(who) as world:
        yield Place(who, level, world)


def test_identity(place: Place) -> None:
    look = ("import os\nstatus = open('/proc/self/status').read()\nprint('uids', os.getresuid(), os.getgroups())\n"
            "print('held', [line.split()[1] for line in status.splitlines() if line[:6] in "
            "('CapInh', 'CapPrm', 'CapEff', 'CapAmb')])\n"
            "print('modes', [line.split()[1] for line in status.splitlines() if line[:8] in "
            "('NoNewPri', 'Seccomp:')])\n"
            "open(os.environ['HOME'] + '/mine', 'w').close()\nprint('cwd', os.path.exists('train.py'))\n")
    assert place.run(look + GOOD).fault is None, place.world.log()
    text = place.world.log()
    uid = int(re.search(r"uids \((\d+), \1, \1\) \[\]", text)[1])  # type: ignore[index]
    assert uid == {2: 1000, 1: USER}[place.level] if place.who == "user" else uid >= boxes.FIRST_UID
    # everything lies open here, so no capability is kept at level 1 either
    assert "held ['0000000000000000', '0000000000000000', '0000000000000000', '0000000000000000']" in text, text
    assert "modes ['1', '2']" in text and "cwd True" in text


CLOSED = ("import os\nstatus = open('/proc/self/status').read()\n"
          "print('effective', [line.split()[1] for line in status.splitlines() if line[:6] == 'CapEff'])\n"
          "for path in ({secret!r}, '/etc/shadow', '/root/.bashrc'):\n"
          "    try: print('READ', open(path).read())\n    except OSError as error: print(path, error.errno)\n"
          "try: print('LISTED', os.listdir({folder!r}))\nexcept OSError as error: print(error.errno)\n")


def test_root_passes_closed_folders_with_one_capability_and_reads_no_more() -> None:
    with world_of("root") as world:
        secret = world.folder / "secret"
        secret.write_text("canary", encoding="ascii")
        source = world.source(CLOSED.format(secret=str(secret), folder=str(world.folder)) + GOOD)
        world.folder.chmod(0o700)
        result = run_as("root", world, world.job(source, max_level=1))
        text = world.log()
    if result.level != 1:
        pytest.skip("level 1 does not hold here")
    assert result.fault is None and "effective ['0000000000000004']" in text, text
    assert "READ" not in text and "LISTED" not in text and "canary" not in text, text


def test_root_without_that_capability_is_told_which_folder_is_closed() -> None:
    with world_of("container") as world:
        if run_as("container", world, world.job(world.source(), max_level=1)).level != 1:
            pytest.skip("level 1 does not hold here")
        world.folder.chmod(0o700)
        result = run_as("container", world, world.job(world.source(), max_level=1))
        assert result.fault == "infra" and f"may not enter {world.folder}" in result.message, result
        python, path = interpreter()  # what a campaign asks before it opens, so that this is one line and no retries
        code = f"import pathlib; from sandbox import box; print(box.out_of_reach(pathlib.{world.folder!r}))"
        for who, told in (("container", str(world.folder)), ("root", "None")):
            done = subprocess.run([*WAYS[who], python, "-c", code], env={"PYTHONPATH": path}, capture_output=True,
                                  text=True, check=True)
            assert done.stdout.strip() == told


def test_fork_bomb(place: Place) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    bomb = (f"import os, sys, time\nif '{mark}' not in sys.argv: os.execv(sys.executable, "
            f"[sys.executable, 'train.py', '{mark}'])\n"
            "while True:\n    try:\n        if os.fork() == 0: time.sleep(60)\n    except OSError: time.sleep(0.02)\n")
    result = place.run(bomb, wall_seconds=10, processes=40)
    assert result.fault == "crash" and "more than 40 processes" in result.message, result
    assert not alive(mark)


def test_memory_hog(place: Place) -> None:
    hog = "kept = []\nwhile True: kept.append(bytearray(b'x') * (8 << 20))\n"
    result = place.run(hog, memory_mb=128, scratch_mb=16)
    assert result.fault == "oom" and "128 MiB" in result.message, result


def test_disk_fill(place: Place) -> None:
    fill = ("import os, time\nfor number in range(400):\n    with open(os.environ['TMPDIR'] + f'/{number}', 'wb') as f:"
            " f.write(bytes(1 << 20))\n    time.sleep(0.005)\ntime.sleep(5)\n")
    result = place.run(fill, scratch_mb=16)
    assert result.fault == "crash", result
    assert ("No space left" if place.level >= 2 else "disk limit of 16 MiB") in result.message, result
    single = place.run("import os\nopen(os.environ['TMPDIR'] + '/one', 'wb').write(bytes(1100 << 20))\n",
                       scratch_mb=16, memory_mb=2000)
    assert single.fault == "crash", single


@pytest.mark.slow
def test_a_flood_of_empty_files(place: Place) -> None:
    flood = ("import os\nfor number in range(10 ** 7):\n    if number % 1000 == 0:\n"
             "        folder = os.environ['TMPDIR'] + f'/{number}'\n        os.mkdir(folder)\n"
             "    os.close(os.open(f'{folder}/{number}', os.O_CREAT))\n")
    result = place.run(flood, wall_seconds=60, scratch_mb=16)
    assert result.fault == "crash" and "disk limit" in result.message, result


def test_log_flood(place: Place) -> None:
    result = place.run("while True: print('y' * 9999)\n")
    assert result.fault == "crash" and "log limit" in result.message


def test_a_daemon_is_gone_two_seconds_after(place: Place) -> None:
    mark = f"mark{uuid.uuid4().hex}"
    daemon = ("import os, signal, sys, time\n"
              "if os.fork() == 0:\n    os.setsid()\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
              "    if os.fork() == 0:\n"
              f"        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
              "    os._exit(0)\ntime.sleep(0.3)\n")
    assert place.run(daemon + GOOD).fault is None
    deadline = time.monotonic() + 2
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark)
