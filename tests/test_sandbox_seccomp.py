"""The filter: its numbers are the kernel's, and a process under it is refused what the list names and nothing else."""

from __future__ import annotations

import errno
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import seccomp

HEADERS = {"x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
           "aarch64": Path("/usr/include/asm-generic/unistd.h")}

TRY = r"""
import ctypes, errno, os, socket, struct, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
code = bytes.fromhex(sys.argv[1])
buffer = ctypes.create_string_buffer(code)
filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filters, 0, 0) == 0
def call(number, *args):
    return 0 if libc.syscall(number, *args) >= 0 else ctypes.get_errno()
for number, *args in eval(sys.argv[2]):
    print(call(number, *map(ctypes.c_long, args)))
def attempt(action):
    try:
        action(); print("fine")
    except OSError as error:
        print(errno.errorcode[error.errno])
attempt(lambda: socket.socket(socket.AF_UNIX))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12))
attempt(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
attempt(lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))
attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
attempt(lambda: socket.socketpair())
attempt(lambda: os.memfd_create("x"))
attempt(lambda: subprocess.run(["/bin/true"], check=True))
attempt(lambda: os.chmod(sys.argv[3], 0o600))
attempt(lambda: os.setpriority(os.PRIO_PROCESS, 0, 1))
attempt(lambda: os.setpriority(os.PRIO_USER, 0, 1))
thread = threading.Thread(target=lambda: print("thread"))
thread.start(); thread.join()
"""
SOCKETS = ["fine", "fine", "fine", "EPERM", "EPERM", "EPERM", "EPERM", "fine"]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the calls tried here are x86_64's")


def run_under(program: bytes, calls: list[tuple[int, ...]], file: Path) -> list[str]:
    file.touch()
    done = subprocess.run([sys.executable, "-I", "-c", TRY, program.hex(), repr(calls), str(file)],
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("no kernel headers here")
    text = HEADERS[machine].read_text(encoding="utf-8")
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    checked = 0
    for name, numbers in seccomp.NUMBERS.items():
        number = numbers[0 if machine == "x86_64" else 1]
        if name in known:
            assert number == known[name], name
            checked += 1
        elif number is not None:
            assert number not in known.values(), name
    assert checked > 60


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("landlock", [False, True])
def test_every_jump_stays_inside_and_every_path_ends(machine: str, landlock: bool) -> None:
    raw = seccomp.program(machine, landlock=landlock, same_user=True)
    code = list(struct.iter_unpack("<HBBI", raw))
    assert len(code) < 4096 and code[-1] == (seccomp.RETURN, 0, 0, seccomp.ALLOW)
    for place, (kind, yes, no, _) in enumerate(code):
        if kind in (seccomp.JUMP_EQUAL, seccomp.JUMP_ABOVE_OR_EQUAL):
            assert place + 1 + max(yes, no) < len(code)


def test_denied_calls_fail_and_needed_ones_do_not(tmp_path: Path) -> None:
    plain = [number for name in seccomp.ALWAYS if (number := seccomp.NUMBERS[name][0]) is not None]
    calls: list[tuple[int, ...]] = [(number, -1, -1, -1, -1, -1) for number in plain]
    said = run_under(seccomp.program(), calls, tmp_path / "file")
    assert said[:len(calls)] == ["1"] * len(calls)
    assert said[len(calls):] == [*SOCKETS, "fine", "fine", "fine", "fine", "fine", "thread"]


def test_arguments_decide(tmp_path: Path) -> None:
    calls = [(56, 0x10000000 | 17), (56, 0x00020000 | 17), (435, 0, 0), (135, 0xFFFFFFFF), (135, 0x0040000),
             (16, 0, 0x5412), (16, 0, (1 << 32) | 0x5412), (16, 0, 0x541C), (0x40000000 | 39,), (53, 2, 1, 0, 0)]
    said = run_under(seccomp.program(), calls, tmp_path / "file")
    assert said[:len(calls)] == ["1", "1", "38", "0", "1", "1", "1", "1", "38", "1"]


def test_level_1_has_no_socket_but_a_pair(tmp_path: Path) -> None:
    strict = seccomp.program(landlock=True)
    calls = [(29, 0, 4096, 0o1600), (68, 0, 0o1600), (302, os.getpid(), 7, 0, 0), (53, 1, 2, 0, 0),
             (53, 1, 0x80002, 0, 0),
             (302, 0, 7, 0, 0)]
    said = run_under(strict, calls, tmp_path / "file")
    assert said == [*["1"] * 5, "0", *["EPERM"] * 7, "fine", "fine", "fine", "fine", "fine", "EPERM", "thread"]
    said = run_under(seccomp.program(landlock=True, same_user=True), [], tmp_path / "file")
    assert said == [*["EPERM"] * 7, "fine", "fine", "fine", "EPERM", "fine", "EPERM", "thread"]


def test_a_gpu_job_at_level_1_may_bind_a_packet_stream_but_connect_nothing(tmp_path: Path) -> None:
    calls = [(41, 1, 5, 0), (49, 3, 0, 0), (41, 1, 0x80005, 0), (41, 1, 1, 0), (41, 1, 2, 0), (41, 2, 5, 0),
             (42, 3, 0, 0)]
    said = run_under(seccomp.program(landlock=True, gpu=True), calls, tmp_path / "file")
    assert said[:7] == ["0", str(errno.EINVAL), "0", "1", "1", "1", "1"]
    said = run_under(seccomp.program(landlock=True), calls, tmp_path / "file")
    assert said[:7] == ["1"] * 7


def test_calls_of_another_architecture_kill(tmp_path: Path) -> None:
    foreign = seccomp.program("aarch64")
    done = subprocess.run([sys.executable, "-I", "-c", TRY, foreign.hex(), "[]", str(tmp_path)], capture_output=True)
    assert done.returncode == -31  # SIGSYS
