"""Who runs a supervisor: root with what it has, or an ordinary user, each with an interpreter that they can reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sandbox_world import World

from sandbox import grants, view
from sandbox.job import Job, Result, read_result

ROOT = Path(__file__).resolve().parent.parent
USER = 12345
CONTAINER = "chown,dac_override,fowner,fsetid,kill,setgid,setuid,setpcap,net_bind_service,net_raw,sys_chroot,setfcap"
"""What root has in a container by default: no CAP_SYS_ADMIN, no CAP_DAC_READ_SEARCH."""
WAYS = {
    "root": (),
    "container": ("setpriv", "--bounding-set", "-all,+" + CONTAINER.replace(",", ",+"), "--inh-caps=-all"),
    "user": ("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"),
}


def interpreter() -> tuple[str, str]:
    """(a Python of this version that every user can reach, PYTHONPATH with which it finds what this one has)."""
    if grants.closed_to_others([*view.interpreter_roots(), ROOT]) is None:
        return sys.executable, str(ROOT)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = shutil.which(f"python{version}", path="/usr/local/bin:/usr/bin")
    packages = sysconfig.get_paths()["purelib"]
    if found is None or grants.closed_to_others([Path(found), Path(packages), ROOT]) is not None:
        pytest.skip(f"another user can reach no Python {version} here")
    return found, f"{ROOT}:{packages}"


@contextmanager
def world_of(who: str) -> Iterator[World]:
    """A world in a folder that everybody can reach (pytest's own is closed), the user's if it is an ordinary one."""
    if os.geteuid() != 0:
        pytest.skip("only root can become others")
    folder = Path(tempfile.mkdtemp(prefix="world-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        yield World(folder)
    finally:
        shutil.rmtree(folder)


def run_as(who: str, world: World, job: Job, timeout: float = 120) -> Result:
    """Supervise ``job`` in a process of ``who``."""
    python, path = interpreter()
    world.last = world.job_folder(job)
    if who == "user":
        for place, _, names in os.walk(world.folder):
            for name in (".", *names):
                os.chown(Path(place, name), USER, USER, follow_symlinks=False)
    done = subprocess.run([*WAYS[who], python, "-m", "sandbox.supervisor", str(world.last)], cwd=ROOT, timeout=timeout,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    result = read_result(world.last)
    assert done.returncode == 0 and result is not None, done.stderr
    return result
