"""The system calls that a box may not make, as a seccomp filter assembled here: classic BPF, no library needed.

A denylist. It takes away what the code under test never needs and what kernel exploits and escapes mostly begin with:
tracing, mounting, namespaces, BPF, io_uring, keys, module and clock calls, exotic sockets. Denied calls fail with
EPERM; ``clone3`` fails with ENOSYS, since its flags lie in memory that a filter cannot read, and the C library then
falls back to ``clone``, whose flags can be checked. Another architecture's calls (32-bit on x86_64) kill the process,
since their numbers mean other things; those of the x32 ABI fail with ENOSYS.

``memfd_create`` stays allowed: CUDA's start needs it. ``LANDLOCK`` is the stricter list of level 1, where no namespace
closes sockets, System V IPC and other processes' limits; ``SAME_USER`` adds the calls that Landlock does not mediate
and that matter only where the job has the caller's own user id.

Does not cover: bugs in calls that are allowed, ioctl above all (GPU drivers), and whatever a pointer argument says.
Numbers: asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); calls after 423 have one number on both.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from collections.abc import Iterable

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* of linux/audit.h."""
X32_BIT = 0x40000000

NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # tracing and reading other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "perf_event_open": (298, 241), "lookup_dcookie": (212, 18),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "swapon": (167, 224), "swapoff": (168, 225), "fanotify_init": (300, 262),
    # large and often attacked parts of the kernel
    "bpf": (321, 280), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "modify_ldt": (154, None), "uselib": (134, None), "_sysctl": (156, None), "nfsservctl": (180, 42),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # the machine itself
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "create_module": (174, None), "reboot": (169, 142), "acct": (163, 89),
    "syslog": (103, 116), "vhangup": (153, 58), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "iopl": (172, None), "ioperm": (173, None),
    # those whose arguments decide
    "personality": (135, 92), "clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "socketpair": (53, 199),
    "ioctl": (16, 29),
    # level 1: what namespaces close elsewhere
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "connect": (42, 203),
    "bind": (49, 200), "mq_open": (240, 180),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    # level 1 with the caller's own user id: metadata, which Landlock leaves alone
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466),
}
"""Name -> number on (x86_64, aarch64); None where that machine has no such call."""

_NAMES = tuple(NUMBERS)


def _between(first: str, last: str) -> tuple[str, ...]:
    return _NAMES[_NAMES.index(first):_NAMES.index(last) + 1]


ALWAYS = _between("ptrace", "ioperm")
"""Denied at every level that filters."""
LANDLOCK = _between("shmget", "mq_open")
"""Denied besides where there is no IPC namespace."""
SAME_USER = _between("chmod", "removexattrat")
"""Denied besides where the job has the caller's user id and no mount namespace."""

NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET (linux/sched.h)."""
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
"""Families allowed in a network namespace of one's own; besides, netlink's routing protocol, for getifaddrs(3)."""
NETLINK_ROUTE = 0
CONNECTED, TYPE_MASK = (socket.SOCK_STREAM, socket.SOCK_SEQPACKET), 0xF
"""Types whose peer cannot be changed; flags like SOCK_CLOEXEC lie above the mask."""
TIOCSTI, TIOCLINUX = 0x5412, 0x541C

LOAD, JUMP_EQUAL, JUMP_ABOVE_OR_EQUAL, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, DENY, NO_CALL = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in ``struct seccomp_data``; both machines are little-endian, so an argument's low word comes first."""

Instruction = tuple[int, int, int, int]
"""(code, jump if true, jump if false, constant)."""


def supported() -> bool:
    """Whether a filter can be made for this machine."""
    return platform.machine() in ARCHITECTURES


def program(machine: str = "", *, landlock: bool = False, same_user: bool = False, gpu: bool = False) -> bytes:
    """The filter as an array of ``struct sock_filter`` for ``machine`` (this one if empty).

    ``landlock``: as at level 1; ``same_user``: besides, as an ordinary user there; ``gpu``: the job has one. Raises
    KeyError for a machine that is not known.
    """
    machine = machine or platform.machine()
    column = tuple(ARCHITECTURES).index(machine)
    code: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE), (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        code += [(JUMP_ABOVE_OR_EQUAL, 0, 1, X32_BIT), (RETURN, 0, 0, NO_CALL)]
    denied = (*ALWAYS, *(LANDLOCK if landlock else ()), *(SAME_USER if landlock and same_user else ()))
    if gpu:
        denied = tuple(name for name in denied if name != "bind")
    for name in denied:
        code += _on(NUMBERS[name][column], [(RETURN, 0, 0, DENY)])
    for name, block in _checked(landlock, gpu).items():
        code += _on(NUMBERS[name][column], block)
    code.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _checked(landlock: bool, gpu: bool) -> dict[str, list[Instruction]]:
    """Calls whose arguments decide. Every block ends in a verdict."""
    blocks: dict[str, list[Instruction]] = {
        "clone3": [(RETURN, 0, 0, NO_CALL)],
        "clone": [*_argument(0), (AND, 0, 0, NEW_NAMESPACES), (JUMP_EQUAL, 1, 0, 0), (RETURN, 0, 0, DENY),
                  (RETURN, 0, 0, ALLOW)],
        # 0xffffffff asks, 0 is the personality that every process has anyway
        "personality": _only(0, (0, 0xFFFFFFFF)),
        # the kernel takes a command as 32 bits, so the upper half of the argument hides nothing
        "ioctl": [*_argument(1), (JUMP_EQUAL, 1, 0, TIOCSTI), (JUMP_EQUAL, 0, 1, TIOCLINUX), (RETURN, 0, 0, DENY),
                  (RETURN, 0, 0, ALLOW)],
        "socketpair": [*_argument(0), (JUMP_EQUAL, 1, 0, socket.AF_UNIX), (RETURN, 0, 0, DENY), *_argument(1),
                       *([(AND, 0, 0, TYPE_MASK), *_accept(CONNECTED), (RETURN, 0, 0, DENY)] if landlock else
                         [(RETURN, 0, 0, ALLOW)])],
    }
    if not landlock:
        blocks["socket"] = [*_argument(0), *_accept(FAMILIES), (JUMP_EQUAL, 1, 0, 16), (RETURN, 0, 0, DENY),
                            *_only(2, (NETLINK_ROUTE,))]
        return blocks
    # Landlock leaves UDP and sockets with a path open: no socket at all. A pair of streams stays connected to itself;
    # one of datagrams could be sent from, and connected, to any path.
    blocks["socket"] = [(RETURN, 0, 0, DENY)]
    if gpu:
        # CUDA's start binds one to an abstract name ("cuda-uvmfd-...") and listens. It cannot be connected here, and
        # a packet stream takes no address, so nothing can be sent from it; a name in the file system is Landlock's.
        blocks["socket"] = [*_argument(0), (JUMP_EQUAL, 1, 0, socket.AF_UNIX), (RETURN, 0, 0, DENY), *_argument(1),
                            (AND, 0, 0, TYPE_MASK), *_accept([socket.SOCK_SEQPACKET]), (RETURN, 0, 0, DENY)]
    # of one's own process only: 0 is oneself
    blocks["prlimit64"] = _only(0, (0,))
    blocks["setpriority"] = blocks["ioprio_set"] = [*_argument(1), (JUMP_EQUAL, 1, 0, 0), (RETURN, 0, 0, DENY),
                                                    *_only(0, (0, 1))]
    return blocks


def _on(number: int | None, block: list[Instruction]) -> list[Instruction]:
    """``block`` if the call is ``number``. The accumulator holds the number before and, if it is another, after."""
    return [] if number is None else [(JUMP_EQUAL, 0, len(block), number), *block]


def _argument(index: int) -> list[Instruction]:
    return [(LOAD, 0, 0, ARGUMENTS + 8 * index)]


def _accept(values: Iterable[int]) -> list[Instruction]:
    return [step for value in values for step in ((JUMP_EQUAL, 0, 1, int(value)), (RETURN, 0, 0, ALLOW))]


def _only(index: int, values: Iterable[int]) -> list[Instruction]:
    """Allow exactly when argument ``index`` is one of ``values``."""
    return [*_argument(index), *_accept(values), (RETURN, 0, 0, DENY)]
