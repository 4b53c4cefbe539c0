"""``python -m sandbox.slurm_start FOLDER``: what a Slurm job does on its node: one start of the job in a job folder.

Slurm may start a job again on another node (``--requeue``), perhaps while the first node still lives and only cannot be
reached. So each start works in a folder of its own, ``FOLDER/start-JOB-COUNT``, and touches nothing else; the engine,
which alone writes FOLDER, takes the first result that it finds. A start that comes after that does nothing.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
from pathlib import Path

from sandbox import gpu, supervisor
from sandbox.job import read_job, write_atomically, write_job


def given(device: str, visible: str) -> str:
    """The device of this node for a job that asks for ``device``: the first one that Slurm has made ``visible``.

    Slurm counts as nvidia-smi does on that node, with its GPUs shut in (cgroups) or not.
    """
    first = visible.split(",")[0]
    return f"cuda:{first}" if gpu.index(device) is not None and first.isdigit() else device


def main(argv: list[str]) -> int:
    """Command line: the job folder. SLURM_JOB_ID and SLURM_RESTART_COUNT come from Slurm."""
    folder = Path(argv[0]).resolve()
    if (folder / "result.json").exists():
        return 0
    own = folder / f"start-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    job = read_job(folder)
    write_job(own, dataclasses.replace(job, device=given(job.device, os.environ.get("CUDA_VISIBLE_DEVICES", ""))))
    write_atomically(own / "node", (os.environ.get("SLURMD_NODENAME") or socket.gethostname()).encode())
    return supervisor.main([str(own)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
