"""Can those machines run the night? Proved by real jobs, a second each: one a slot to its result, and one stopped.

The jobs use no data and no torch. Does not cover whether the target trains there: the baseline run finds out.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agent import config as configuration
from agent import engines
from agent.doctor.checks import Check
from agent.errors import UserError
from agent.resources import default_target
from agent.site import find_devices
from sandbox.engine import Engine, EngineError
from sandbox.job import Evaluation, Job, Limits, Result

WAIT = 300.0
"""Seconds that a job may take, the queue included."""
PROGRAM = '''import sys, time
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
print("value: 42")
'''


def examine(asked: str, repo: Path | None, runs: Path, preset: str, slots: int | None) -> Iterator[Check]:
    """Every check in turn, as it is made."""
    try:
        config = configuration.load(default_target() if repo is None else repo, preset)
        kind = engines.chosen(asked, "", config.engine)
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=runs, prefix=".doctor-", ignore_cleanup_errors=True) as temporary:
            folder = Path(temporary).resolve()
            folder.chmod(0o755)
            remote = engines.cluster(kind, config.engine, folder)
            try:
                devices = engines.reserve(remote, config, slots, 3) if remote else find_devices(config, slots)
                notes = remote.notes if remote else ()
                yield Check("engine", "ok", f"{kind}: {len(devices)} slots ({', '.join(dict.fromkeys(devices))})")
                yield from (Check("found", "warning" if note.startswith("left out") else "ok", note) for note in notes)
                yield from _prove(engines.Opening(kind, remote).runner, folder, devices)
            finally:
                if remote is not None:
                    remote.close()
    except UserError as error:
        yield Check("engine", "error", error.problem, error.mend)


def _prove(engine: Engine, folder: Path, devices: tuple[str, ...]) -> Iterator[Check]:
    """A job on each slot at the same time, then one that is stopped in the middle."""
    source = folder / "source"
    source.mkdir()
    (source / "program.py").write_text(PROGRAM, encoding="utf-8")
    job = Job("doctor", str(source), ("python", "program.py", "0.5"), 0, 0, device=devices[0],
              evaluation=Evaluation("reported", pattern=r"value: (\d+)", wall_seconds=20),
              limits=Limits(wall_seconds=60, memory_mb=512, scratch_mb=64))
    began = time.monotonic()
    try:
        for number, device in enumerate(devices):
            engine.start(folder / f"slot{number}", dataclasses.replace(job, device=device))
        for number, device in enumerate(devices):
            found = _wait(engine, folder / f"slot{number}", began + WAIT)
            yield _told(device, found, time.monotonic() - began)
        engine.start(folder / "stopped", dataclasses.replace(job, command=("python", "program.py", "50")))
    except EngineError as error:
        yield Check("job", "error", error.problem, error.mend)
        return
    deadline = time.monotonic() + WAIT
    while engine.poll(folder / "stopped") is None and time.monotonic() < deadline and (
            engine.progress(folder / "stopped") is None):
        time.sleep(0.2)
    began = time.monotonic()
    engine.stop(folder / "stopped")
    ended = engine.poll(folder / "stopped")
    if ended is not None and ended.message == "stopped":
        yield Check("stop", "ok", f"a running job was ended in {time.monotonic() - began:.1f} s")
    else:
        yield Check("stop", "error", f"a job did not stop ({ended.message if ended else 'no result'})",
                    "See the log of its supervisor on the node.")


def _wait(engine: Engine, folder: Path, deadline: float) -> Result | None:
    while (found := engine.poll(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if found is None:
        engine.stop(folder)
    return found


def _told(device: str, found: Result | None, seconds: float) -> Check:
    if found is None:
        return Check("job", "error", f"{device}: no result after {WAIT:.0f} s",
                     "Is the queue full? `squeue` or `ray status` says.")
    if found.fault:
        return Check("job", "error", f"{device}: {found.fault}: {found.message}", "Mend that on the node.")
    facts = found.fingerprint
    return Check("job", "ok" if found.level else "warning",
                 f"{device}: ran and came home whole in {seconds:.1f} s; {facts.get('device', '')}, torch "
                 f"{facts.get('torch', '')}, Python {facts.get('python', '')}, isolation level {found.level}",
                 "" if found.level else "At level 0 only the idea cards that come with ratchet are run: `ratchet "
                 "doctor` on that node says how to reach a higher level.")
