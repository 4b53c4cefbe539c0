"""``python -c TEXT MODULES...``: the first program of a warm box. It imports, waits for a job, and becomes it.

It runs before anything of a candidate is known: the folder that will hold the code is still empty. It imports the
modules, says on HARNESS_FD which top-level names are now taken, and waits for the command line. Then it is the program
``python SCRIPT ARGUMENTS``: the same ``sys.argv``, ``sys.path``, ``__main__`` and traceback, in the same environment,
which was set before the interpreter started. It serves one job and ends with it, so nothing that a job does to it is
there for another. It imports nothing of the harness, for it is seen in the box.

    box -> harness   r  JSON {modules, missing, at}: ready; ``at`` is the monotonic clock in seconds
    harness -> box   g  JSON [SCRIPT, ARGUMENTS...]

Does not cover: a program that looks at its own entry in ``/proc``, which shows this text as its command line.
"""

import builtins
import importlib
import importlib.machinery
import json
import os
import socket
import struct
import sys
import time
from typing import NoReturn

HEADER = struct.Struct("<cQ")


def warm_up(names: list[str]) -> list[str]:
    """Import ``names``; those that cannot be imported are returned: the job will find out in its own way."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    return missing


def exactly(sock: socket.socket, count: int) -> bytes:
    """Exactly ``count`` bytes. Ends the process when the supervisor is gone."""
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            sys.exit(0)
        data += more
    return data


def wait(sock: socket.socket, missing: list[str]) -> list[str]:
    """Say that the imports are done, and wait for the command line."""
    taken = sorted({name.partition(".")[0] for name in sys.modules} - {"__main__"})
    body = json.dumps({"modules": taken, "missing": missing, "at": time.monotonic()}).encode()
    sock.sendall(HEADER.pack(b"r", len(body)) + body)
    length: int = HEADER.unpack(exactly(sock, HEADER.size))[1]
    words: list[str] = json.loads(exactly(sock, length))
    return words


def become(words: list[str]) -> None:
    """Run the script ``words[0]`` as the interpreter would run it. Its names replace those of this program."""
    own, leave_quickly, path = sys, leave, os.path.abspath(words[0])
    own.argv, own.orig_argv = words, [own.orig_argv[0], *words]
    own.path.insert(0, os.path.dirname(os.path.realpath(path)))
    importlib.invalidate_caches()  # the folder was empty when it was last looked at
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    values = own.modules["__main__"].__dict__
    fresh: dict[str, object] = {
        "__name__": "__main__", "__doc__": None, "__package__": None, "__loader__": loader, "__spec__": None,
        "__annotations__": {}, "__builtins__": builtins, "__file__": path, "__cached__": None}
    try:
        code = loader.source_to_code(loader.get_data(path), path)  # not get_code, which would take bytecode
        values.clear()
        values.update(fresh)
        exec(code, values)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        own.excepthook(type(error), error.with_traceback(trace), trace)
        own.exit(1)
    leave_quickly()


def leave() -> NoReturn:
    """End as the interpreter does, but for its last step: taking torch apart takes 0.6 CPU seconds and gives nothing.

    Threads are waited for, exit functions run, and output is flushed; destructors of what is left are not called.
    """
    import atexit
    import os
    import sys
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(0)


def main(names: list[str]) -> None:
    sys.path.pop(0)  # the working folder, which `-c` puts there: it will hold the job's code
    sock = socket.socket(fileno=int(os.environ["HARNESS_FD"]))
    missing = warm_up(names)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        sys.exit("an import has initialised CUDA: this box may not wait")
    words = wait(sock, missing)
    sock.detach()  # the number stays open for the job
    become(words)


if __name__ == "__main__":
    main(sys.argv[1:])
