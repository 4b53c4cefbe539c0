"""Fork server: one process that has imported the supervisor's modules and forks a supervisor for each job.

Importing them costs a third of a CPU second, as much as a short job itself; a fork costs a few milliseconds.
``ForkServer`` is the agent's end; ``python -m sandbox.forkserver FD`` is the process, which takes over the socket FD.

Promises
- Each supervisor is a process of its own, in a session of its own, forked from a process that has met no job: nothing
  is carried from one to the next. Its command line reads as if it had been started by itself (``ps`` shows the folder).
- The server has the scrubbed environment of a supervisor, one thread, and no handle of a job but while it forks.
- It ends when the agent does. Supervisors do not.
- A server that died is replaced at the next start. A start whose answer was lost is not made again, since the
  supervisor may run: it signs its folder, or else the job is taken for stopped (engine.py).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from sandbox import process

MOST = 1 << 16
"""Bytes of a request."""
HANDLES = 8
"""File descriptors of a request, at most."""
READY, ANSWERS, PARTING = 60.0, 20.0, 5.0
"""Seconds that the server may take for its imports, for a fork, and to end: then it is killed, for it hangs. Ctrl-C is
held back meanwhile."""
REFUSED = b"!"
"""Begins an answer that says why there was no fork."""
ROOM = "-" * 4096
"""An argument whose place in memory holds a supervisor's command line later: a path has at most so many bytes."""


class ForkServer:
    """The agent's end. ``environment``: all that the server and its supervisors get to see of variables."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._popen: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def fork(self, arguments: Sequence[str], given: int, log: int, lifeline: int | None = None) -> str | None:
        """Have a supervisor run with these ``arguments``: standard input ``given``, output and errors to ``log``.
        With a ``lifeline`` its number there is appended to the arguments.

        Returns its name (``process.name_of``), empty if it has ended already, None when that is not known. Raises
        OSError when no server can be started, or it cannot fork.
        """
        request = json.dumps(list(arguments)).encode()
        handles = [given, log, *(() if lifeline is None else (lifeline,))]
        with self._lock:
            for attempt in (1, 2):
                server = self._connect(log)
                try:
                    socket.send_fds(server, [request], handles)
                except OSError:  # it was gone before: nothing was started
                    self._drop()
                    if attempt == 2:
                        raise
                    continue
                answer = b""
                with contextlib.suppress(OSError):
                    server.settimeout(ANSWERS)
                    answer = server.recv(MOST)
                if answer.startswith(REFUSED):
                    raise OSError(answer.removeprefix(REFUSED).decode("utf-8", "replace"))
                if answer:
                    return answer.decode("ascii").strip()
                self._drop()
                return None
        raise AssertionError("not reached")

    def close(self) -> None:
        """End the server. Supervisors are left alone."""
        with self._lock:
            self._drop()

    def _connect(self, log: int) -> socket.socket:
        """The socket of a server that lives, as far as can be told. What it says of itself goes to ``log``."""
        if self._socket is not None and self._popen is not None and self._popen.poll() is None:
            return self._socket
        self._drop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-P", "-m", "sandbox.forkserver", str(theirs.fileno()), ROOM], cwd="/",
                    env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    pass_fds=(theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        ours.settimeout(READY)
        try:
            if not ours.recv(MOST):
                raise OSError("the fork server ended before it was ready")
        except TimeoutError as error:
            self._drop()
            raise OSError(f"the fork server was not ready after {READY:g} s") from error
        except OSError:
            self._drop()
            raise
        return ours

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._popen is not None:
            try:
                self._popen.wait(PARTING)
            except subprocess.TimeoutExpired:
                self._popen.kill()
                self._popen.wait()
        self._popen = self._socket = None


def serve(requests: socket.socket) -> None:
    """Fork a supervisor for each request until the agent is gone."""
    from sandbox import supervisor

    process.retitle([sys.executable, "-P", "-m", "sandbox.forkserver"])
    silent = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number in (1, 2):  # the log is the first job's
        os.dup2(silent, number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps those that end
    gc.freeze()  # what is imported is shared for good
    requests.send(b"ready")
    while True:
        data, handles, _, _ = socket.recv_fds(requests, MOST, HANDLES, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        answer = b" "
        try:
            pid = os.fork()
        except OSError as error:  # too many processes, too little memory: of the machine, or of this user
            answer = REFUSED + f"no process can be forked ({error.strerror})".encode()
        else:
            if pid == 0:
                requests.close()
                _become(supervisor.main, json.loads(data), handles)
            if (found := process.stat(pid)) is not None:
                answer = process.name_of(pid, found).encode()
        for handle in handles:
            os.close(handle)
        try:
            requests.send(answer)
        except OSError:  # the agent died meanwhile
            return


def _become(main: Callable[[list[str]], int], arguments: list[str], handles: list[int]) -> NoReturn:
    """The forked process from its first line to its end."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        given, log, *lifeline = handles
        for number, handle in enumerate((given, log, log)):
            os.dup2(handle, number)
        os.close(given)
        os.close(log)
        arguments += map(str, lifeline)
        process.retitle([sys.executable, "-P", "-m", "sandbox.supervisor", *arguments])
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)  # not the way out of the server, whose it is to clear up


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
