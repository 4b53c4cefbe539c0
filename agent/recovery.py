"""What a start finds after a death: of the process, of its git, of the whole machine. Done under the run's lock.

Most of a recovery is the campaign's own (campaign.py ``resume``): it follows from the ledger. Here is what the ledger
does not tell.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from agent import git
from agent.court import Trial
from agent.ledger import State
from agent.records import Result, Run
from sandbox import process


def mend(folder: Path, state: State, say: Callable[[str], None]) -> dict[str, str]:
    """Clear away what a killed process left in ``folder`` and nothing would ever use. Returns facts for ``started``.

    Where the machine was started anew since, the checked-out trees are written again: they are renamed into place, and
    a power cut may have taken bytes of them all the same. No job can be alive then that reads them.
    """
    removed = git.unlock(folder / "repo.git")
    if removed:
        say(f"removed {', '.join(path.name for path in removed)}, left behind by a git that was killed")
    boot = process.boot_id()
    if state.campaign.get("boot", boot) != boot:
        say("the machine was started anew meanwhile: jobs that ran then are lost and are run again")
        shutil.rmtree(folder / "source", ignore_errors=True)
    for litter in (folder / "source").glob(".*"):
        shutil.rmtree(litter, ignore_errors=True)
    return {"boot": boot}


def tiny_run(trial: Trial, state: State) -> tuple[Run, Result] | None:
    """The finished tiny run of a trial on whose result nobody has acted."""
    for run in reversed(trial.attempt.runs):
        result = state.results.get(run.id)
        if run.purpose == "preflight" and run.tree == trial.candidate.tree and result and result.fault != "infra":
            return run, result
    return None
