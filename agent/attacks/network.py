"""Family *network*: ways out of the box, and to services on this machine."""

from __future__ import annotations

from agent.attacks.patches import before
from agent.attacks.record import Attack

FAMILY = "network"
_OPEN = "a plain process has the whole network"


def _calls(family: str, kind: str, address: str, first: str = "pass") -> str:
    return f'''
import os, socket
try:
    {first}
    with socket.socket(socket.{family}, socket.{kind}) as sock:
        sock.settimeout(2)
        sock.connect({address})
        sock.sendall(b"hello")
except OSError as error:
    print(error)
'''


ATTACKS = (
    Attack("internet-sockets", FAMILY, "sends what it knows over TCP, UDP and a virtual machine's socket",
           "no network in the box", ("same",), ("contact",), uncovered={0: _OPEN},
           edits=before(_calls("AF_INET", "SOCK_STREAM", '("127.0.0.1", @TCP@)')
                        + _calls("AF_INET", "SOCK_DGRAM", '("127.0.0.1", @UDP@)')
                        + _calls("AF_VSOCK", "SOCK_STREAM", "(2, @TCP@)"))),
    Attack("abstract-socket", FAMILY, "speaks to a service on an abstract UNIX socket", "own network namespace",
           ("same",), ("contact",), uncovered={0: _OPEN},
           edits=before(_calls("AF_UNIX", "SOCK_STREAM", '"\\0@ABSTRACT@"'))),
    Attack("named-socket", FAMILY, "speaks to a service on a UNIX socket in the file system, as docker.sock is",
           "no folder that holds one is mounted", ("same",), ("contact",), uncovered={0: _OPEN},
           edits=before(_calls("AF_UNIX", "SOCK_STREAM", '"socket"', "os.chdir(\"@FOLDER@\")"))),
)
