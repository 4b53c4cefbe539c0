"""A Slurm of one machine for the tests: munged, slurmctld and slurmd with a configuration of their own in a folder.

Needs root and the Debian packages slurm-wlm and munge.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def missing() -> list[str]:
    """What a test machine lacks."""
    lacking = [name for name in COMMANDS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return lacking if os.geteuid() == 0 else ["root", *lacking]


class SlurmSite:
    """The daemons, from ``start`` to ``stop``. ``environment``: what Slurm's commands need to find them."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder, self.environment = folder, {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        host, state = socket.gethostname().split(".")[0], folder / "state"
        for name in ("state", "spool", "log"):
            (folder / name).mkdir()
        ports = _free_ports(2)
        (folder / "slurm.conf").write_text(f"""
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={state}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=300
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=tests Nodes={host} Default=YES MaxTime=60 State=UP OverSubscribe=NO
""", encoding="utf-8")
        self.host = host

    def start(self) -> None:
        """Bring everything up, and wait until the node takes jobs."""
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        self._run("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                  f"--pid-file={munge}/pid", f"--seed-file={munge}/seed", f"--log-file={munge}/log")
        _until(lambda: (munge / "socket").exists())
        self.start_controller()
        self.start_node()
        _until(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%t"))

    def start_controller(self) -> None:
        self._run("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])

    def start_node(self) -> None:
        self._run("slurmd", "-D", "-f", self.environment["SLURM_CONF"])

    def kill(self, name: str) -> None:
        """End a daemon as a crash would."""
        popen = self._running.pop(name)
        popen.kill()
        popen.wait()

    def stop_controller(self) -> None:
        """As an administrator would: a controller that is killed may lose its last jobs, and drains the node then."""
        popen = self._running.pop("slurmctld")
        popen.terminate()
        popen.wait()

    def call(self, *words: str) -> str:
        return subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=30,
                              check=False).stdout

    def stop(self) -> None:
        self.call("scancel", "--full", "--state=RUNNING")
        self.call("scancel", "--state=PENDING")
        for popen in reversed(self._running.values()):
            popen.terminate()
            try:
                popen.wait(10)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()

    def _run(self, *words: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin"
        with (self.folder / f"{words[0]}.out").open("ab") as log:
            self._running[words[0]] = subprocess.Popen(words, env=os.environ | self.environment | {"PATH": path},
                                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _until(condition: object, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "Slurm did not come up"
        time.sleep(0.1)
