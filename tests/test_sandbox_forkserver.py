"""The fork server: every supervisor a process of its own, whatever becomes of the server or of the agent."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sandbox_world import World
from test_sandbox_engine import finished, until

from sandbox import forkserver, process
from sandbox.engine import EngineError, LocalEngine


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = LocalEngine()
    yield engine
    engine.close()


def slow(world: World) -> Path:
    return world.source("from fake import *\ntrain(on_batch=lambda step: time.sleep(0.1))\n")


def words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").rstrip("\0").split("\0")


def supervisor_of(folder: Path) -> int:
    return int((folder / "supervisor.pid").read_text(encoding="ascii").split()[0])


def server_of() -> int:
    return next(pid for pid in process.children(os.getpid()) if words(pid)[3:] == ["sandbox.forkserver"])


def test_a_supervisor_looks_and_acts_as_if_it_had_been_started_by_itself(world: World, engine: LocalEngine) -> None:
    folder = world.folder / "job"
    engine.start(folder, world.job(slow(world), steps=30))
    pid, server = supervisor_of(folder), server_of()
    until(lambda: words(pid)[-1] == str(folder.resolve()))
    assert words(pid) == [sys.executable, "-P", "-m", "sandbox.supervisor", str(folder.resolve())]
    assert os.getsid(pid) == pid != os.getsid(server) and Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    assert not int(ignored.split()[1], 16) >> (signal.SIGCHLD - 1) & 1  # or it could not wait for its box
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
    kinds = {str(handle.readlink()).partition(":")[0] for handle in Path(f"/proc/{server}/fd").iterdir()}
    assert kinds <= {"socket", os.devnull}  # no handle of the job stays
    engine.stop(folder)


def test_the_server_ends_with_its_agent_and_the_job_goes_on(world: World) -> None:
    folder = world.job_folder(world.job(slow(world), steps=10))
    script = ("import sys, time\nfrom pathlib import Path\nfrom sandbox.engine import LocalEngine\n"
              "from sandbox.job import read_job\nengine, folder = LocalEngine(), Path(sys.argv[1])\n"
              "engine.start(folder, read_job(folder))\nprint(flush=True)\ntime.sleep(60)\n")
    agent = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE,
                             cwd=Path(__file__).parent.parent)
    assert agent.stdout is not None and agent.stdout.readline() == b"\n"
    (server,) = process.children(agent.pid)
    known = process.stat(server)
    agent.kill()
    agent.wait()
    agent.stdout.close()
    assert known is not None
    until(lambda: not process.running(server, known.start_ticks), 3)
    assert finished(LocalEngine(), folder).steps == 10


def test_a_server_that_was_killed_is_replaced_and_its_jobs_go_on(world: World, engine: LocalEngine) -> None:
    first, second = world.folder / "first", world.folder / "second"
    engine.start(first, world.job(slow(world), steps=10))
    server = server_of()
    os.kill(server, signal.SIGKILL)
    until(lambda: (found := process.stat(server)) is None or found.state in "ZX")  # while it dies an answer may be lost
    engine.start(second, world.job(slow(world), steps=3))
    assert (finished(engine, first).steps, finished(engine, second).steps) == (10, 3)


def test_a_start_whose_answer_was_lost_is_not_made_twice(world: World, engine: LocalEngine,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world.folder / "job"
    engine.start(world.folder / "before", world.job(world.source()))
    sent, real = [], socket.send_fds

    def then_dies(sock: socket.socket, *given: object) -> int:
        sent.append(real(sock, *given))  # type: ignore[arg-type]
        sock.shutdown(socket.SHUT_RD)  # the answer finds nobody
        return sent[-1]

    monkeypatch.setattr(socket, "send_fds", then_dies)
    engine.start(folder, world.job(slow(world), steps=5))
    assert len(sent) == 1
    assert finished(engine, folder).steps == 5  # it had been started all the same


def test_what_cannot_start_is_one_clear_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.folder / "other" / "sandbox").mkdir(parents=True)  # a broken package in front of ours
    (world.folder / "other" / "sandbox" / "__init__.py").write_text("raise ImportError('no sandbox here')\n")
    monkeypatch.setattr("sandbox.engine.environment", lambda: {"PYTHONPATH": str(world.folder / "other")})
    engine, folder = LocalEngine(), world.folder / "job"
    with pytest.raises(EngineError, match="No supervisor can be started") as found:
        engine.start(folder, world.job(world.source()))
    assert str(folder / "supervisor.log") in found.value.mend
    assert "no sandbox here" in (folder / "supervisor.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("length", [1, 100, 4000, 9000])
def test_a_command_line_is_rewritten_as_far_as_there_is_room(length: int) -> None:
    script = ("import sys\nfrom sandbox import process\n"
              "def shown(): return open('/proc/self/cmdline').read().rstrip(chr(0))\n"
              "whole = len(open('/proc/self/cmdline').read())\n"
              f"process.retitle(['a', 'x' * {length}])\nfirst = shown()\nprocess.retitle(['b'])\n"
              "print(whole, len(first), first[:4].encode(), shown())\n")
    found = subprocess.run([sys.executable, "-c", script, "-" * 4096], capture_output=True, text=True,
                           cwd=Path(__file__).parent.parent, check=True).stdout.split()
    assert found[2:] == [str((b"a\0" + b"x" * length)[:4]), "b"]
    assert int(found[1]) == min(2 + length, int(found[0]) - 1)


def test_a_server_that_does_not_answer_is_given_up(
        world: World, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is held back while it is asked."""
    monkeypatch.setattr(forkserver, "ANSWERS", 0.3)
    monkeypatch.setattr(forkserver, "PARTING", 0.3)
    engine.start(world.folder / "first", world.job(slow(world), steps=2))
    assert finished(engine, world.folder / "first").steps == 2
    os.kill(server_of(), signal.SIGSTOP)
    began = time.monotonic()
    engine.start(world.folder / "second", world.job(slow(world), steps=2))
    assert time.monotonic() - began < 5
    engine.start(world.folder / "third", world.job(slow(world), steps=2))
    assert finished(engine, world.folder / "third").steps == 2


def test_a_server_that_is_not_ready_in_time_is_an_error_with_its_reason(
        world: World, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "READY", 0.001)
    with pytest.raises(EngineError, match="not ready after"):
        engine.start(world.folder / "job", world.job(slow(world)))


def test_why_there_was_no_fork_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real server over a real socket, its fork refused as the kernel does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()

        def refused() -> int:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        os.fork = refused  # type: ignore[assignment]
        try:
            forkserver.serve(theirs)
        finally:
            os._exit(0)
    theirs.close()
    server = forkserver.ForkServer({})
    monkeypatch.setattr(server, "_connect", lambda log: ours)
    with ours, Path(os.devnull).open("r+b") as nothing:
        assert ours.recv(100) == b"ready"
        for _ in range(2):  # it goes on
            with pytest.raises(OSError, match=r"no process can be forked \(Resource temporarily unavailable\)"):
                server.fork(["x"], nothing.fileno(), nothing.fileno())
    assert os.waitpid(child, 0)[1] == 0
