"""Telling what went wrong from the outside: exit code, who killed it, and the end of the log."""

from __future__ import annotations

import builtins
import re

from sandbox.job import Fault

OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|MemoryError|std::bad_alloc|[Cc]an(?:no|')t allocate memory"
)
EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Warning|Iteration)(?::.*)?$")


class JobFault(Exception):
    """The job ended without a valid number. ``message`` is one line for a person."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault: Fault = fault
        self.message = " ".join(message.split())[:500]


def from_exit(code: int, tail: str) -> JobFault:
    """Fault of a process that ended by itself with ``code`` (not 0), from the end of its log.

    Signal 9 that neither the harness nor the box's own memory cap sent (running.py knows those) comes from outside:
    from the kernel when the whole machine is out of memory, or from a person. The machine's fault, so the job is done
    again. bubblewrap reports signal N as 128 + N, Popen as -N.
    """
    if OUT_OF_MEMORY.search(tail):
        return JobFault("oom", last_error(tail) or "out of memory")
    number = -code if code < 0 else code - 128 if 128 < code < 160 else 0
    if number == 9:
        return JobFault("infra", "killed from outside (signal 9), most likely by the kernel for lack of memory on the "
                                 "machine")
    if number:
        return JobFault("crash", f"died of signal {number}")
    return JobFault("crash", last_error(tail) or f"exit code {code}")


def last_error(tail: str) -> str:
    """The last line that reads like a Python exception, else the last line; empty for an empty log."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if EXCEPTION.match(line)), lines[-1] if lines else "")


KNOWN = {"OutOfMemoryError", "AcceleratorError", "SafetensorError", "JSONDecodeError"}
"""Exceptions of libraries whose names may be repeated."""


def exception_name(tail: str) -> str:
    """Only the class name of the last exception, and only if it is Python's or a well-known one.

    The model server sees held-out text, and the text of an exception could carry it out to the proposer.
    """
    lines = [line.strip() for line in tail.splitlines()]
    found = next((line for line in reversed(lines) if EXCEPTION.match(line)), "").partition(":")[0]
    name = found.rpartition(".")[2]
    return name if hasattr(builtins, name) or name in KNOWN else "an exception of its own" if found else ""
