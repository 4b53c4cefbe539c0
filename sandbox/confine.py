"""``python -I -S confine.py PLAN REPORT COMMAND...``: shuts itself in without namespaces and becomes the command.

The first process of a box at level 1, and at levels 2 and 3 what takes many held-out files out of sight, where a mount
for each would cost 1 ms. It imports nothing of the harness: what it is to do comes as JSON on the file
descriptor PLAN (``Plan``), and why it could not goes to REPORT, which closes by itself when the command is executed.
In this order, since each step takes away what the one before needed:

1. the Landlock ruleset is filled (its paths may lie behind folders that the job's user id may not enter);
2. groups, user id and capabilities are dropped, where the plan names a user id;
3. no new privileges; die with the supervisor (a change of user id resets that);
4. Landlock and then the seccomp filter are put on, and the command is executed.

All of it is inherited by everything that the command starts, and none of it can be taken off.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import struct
import sys
from typing import TypedDict

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS = (
    1, 8, 22, 24, 28, 38)
PR_CAP_AMBIENT = 47
NO_SETUID_FIXUP = 0b1100
"""Securebits: a user id does not change capabilities, and that cannot be undone."""
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 2, 4, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, on every machine."""
CAPSET = {"x86_64": 126, "aarch64": 91}
CAP_DAC_READ_SEARCH, CAP_LAST = 2, 63

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG = (
    1 << bit for bit in range(9))
MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = (1 << bit for bit in range(9, 16))
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
RIGHTS_BY_ABI = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
"""File system rights that the kernel knows by Landlock's ABI; those of 5 hold for all later ones."""
NET_RIGHTS = 0b11
"""Bind and connect by TCP (ABI 4)."""
SCOPES = 0b11
"""Abstract UNIX sockets and signals stay within the box (ABI 6)."""


class Plan(TypedDict):
    """What the supervisor asks for."""

    uid: int
    """User and group id to become; -1: stay who one is."""
    search: bool
    """Keep CAP_DAC_READ_SEARCH, to pass folders that are closed to that id. Landlock limits what it can read."""
    rules: list[tuple[str, int]]
    """Path and Landlock rights; a path that is not there is left out."""
    handled: int
    """File system rights that the rules decide on; all others stay as they are. 0: all rights, TCP and the scopes."""
    filter: str
    """The seccomp filter, in hexadecimal; empty: none."""
    parent: int
    """Process id of the supervisor, with which to die; 0: somebody else sees to that."""


libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Landlock's ABI version; 0 where the kernel has none or it is switched off."""
    return max(int(libc.syscall(CREATE_RULESET, None, 0, 1)), 0)


def ruleset(rules: list[tuple[str, int]], only: int = 0) -> int:
    """A descriptor of a ruleset that allows only ``rules`` of what it handles: ``Plan.handled``. Raises OSError."""
    version = abi()
    handled = RIGHTS_BY_ABI[min(max(version, 1), 5)] & (only or ~0)
    attributes = struct.pack("QQQ", handled, NET_RIGHTS if version >= 4 and not only else 0,
                             SCOPES if version >= 6 and not only else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    made = _check(libc.syscall(CREATE_RULESET, attributes[:size], size, 0), "landlock_create_ruleset")
    for path, rights in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        wanted = rights & handled & (~0 if stat.S_ISDIR(os.fstat(place).st_mode) else FILE_RIGHTS)
        if wanted:
            _check(libc.syscall(ADD_RULE, made, 1, struct.pack("=Qi", wanted, place), 0), f"landlock_add_rule {path}")
        os.close(place)
    return made


def become(uid: int, search: bool) -> None:
    """Take on ``uid`` for good, without groups and without capabilities but, if ``search``, the one. Raises OSError."""
    os.setgroups([])
    if search:
        # access(2) else forgets the capability, and compilers that ask it take their folder for closed. Without
        # CAP_SETPCAP it is refused, and they fail.
        libc.prctl(PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0)
    for capability in range(CAP_LAST + 1):
        if not (search and capability == CAP_DAC_READ_SEARCH):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # without CAP_SETPCAP it stays, and grants nothing
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _check(libc.prctl(PR_SET_KEEPCAPS, int(search), 0, 0, 0), "PR_SET_KEEPCAPS")
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kept = 1 << CAP_DAC_READ_SEARCH if search else 0
    header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", kept, kept, kept, 0, 0, 0)
    _check(libc.syscall(CAPSET[os.uname().machine], header, sets), "capset")
    if search:
        _check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0), "PR_CAP_AMBIENT_RAISE")


def shut_in(plan: Plan) -> None:
    """Everything but the last step. Raises OSError."""
    rules = ruleset(plan["rules"], plan["handled"])
    if plan["uid"] >= 0:
        become(plan["uid"], plan["search"])
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    if plan["parent"]:
        _check(libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0), "PR_SET_PDEATHSIG")
        if os.getppid() != plan["parent"]:
            raise ProcessLookupError("the supervisor is gone")
    _check(libc.syscall(RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)
    if not plan["filter"]:
        return
    code = bytes.fromhex(plan["filter"])
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held))
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0), "PR_SET_SECCOMP")


def main(argv: list[str]) -> int:
    """Shut in and execute; returns only when that failed, with the exit code 126."""
    report, command = int(argv[1]), argv[2:]
    if report > 2:
        os.set_inheritable(report, False)
    try:
        with os.fdopen(int(argv[0]), "rb") as file:
            plan: Plan = json.load(file)
        shut_in(plan)
        os.execvpe(command[0], command, os.environ)
    except OSError as error:
        os.write(report, f"{error.strerror or error}: {error.filename or ''}".encode())
    return 126


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
