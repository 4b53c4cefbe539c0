"""Can this machine run the night? One line a check; what is wrong comes with its mend. Changes nothing.

Covers the interpreter, torch and its devices, git, the box, the target and its configuration, the model endpoint
(configured, not called), and disk. Does not cover whether the target trains: the campaign's baseline run finds out.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent import config, git
from agent.errors import UserError
from agent.propose import MODELS
from agent.proposers import choose
from agent.resources import default_target
from sandbox import box, cgroup, escape

MIN_GIT = (2, 38)
"""The campaign's settings need safe.bareRepository, which came with it."""
MIN_FREE_GB = 5.0

_TORCH = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "devices": names}))
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line. ``error``: a run cannot start; ``warning``: it can, with a loss that ``mend`` would avoid."""

    name: str
    state: Literal["ok", "warning", "error"]
    text: str
    mend: str = ""

    def line(self) -> str:
        mark = {"ok": "OK     ", "warning": "WARNING", "error": "ERROR  "}[self.state]
        return f"{mark}  {self.name:<8} {self.text}{f'  Mend: {self.mend}' if self.mend else ''}"


def examine(repo: Path | None, runs: Path, preset: str = "") -> Iterator[Check]:
    """Every check in turn, as it is made (torch takes a few seconds)."""
    yield _python()
    yield _git()
    yield from _box()
    yield from _torch()
    told, found = _target(repo, preset)
    yield from told
    yield from _model(found.model if found else config.Model())
    yield _disk(runs)


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _git() -> Check:
    try:
        text = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return Check("git", "error", "not found", "Install git (2.38 or newer) and put it on PATH.")
    number = text.split()[2] if len(text.split()) > 2 else "0"
    version = tuple(int(part) for part in number.split(".")[:2] if part.isdigit())
    if version < MIN_GIT:
        return Check("git", "error", number, "Install git 2.38 or newer.")
    return Check("git", "ok", number)


def _box() -> Iterator[Check]:
    """The level, what it covers and what not. Only level 0 is a warning; the way up is shown at every one."""
    found = box.explain()
    level = found.level
    capped = "capped by a control group" if level and cgroup.available() else "polled five times a second"
    why = "".join(f"; level {int(other)} refused: {reason}" for other, reason in found.refused.items())
    mend = box.FURTHER[level]
    if level is box.Level.PLAIN:
        mend += " Until then only the shipped idea cards run without --unconfined."
    yield Check("box", "ok" if level else "warning",
                f"level {int(level)} ({box.NAMES[level]}), memory {capped}{why}", mend)
    yield Check("stops", "ok", "; ".join(escape.covers(level)))
    yield Check("leaves", "ok" if level else "warning", "; ".join(escape.gaps(level)))


def _torch() -> Iterator[Check]:
    """In a process of its own, since a broken torch can take its importer down."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _TORCH], capture_output=True, text=True, timeout=120,
                              stdin=subprocess.DEVNULL)
        told = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError):
        yield Check("torch", "warning", "cannot be imported by this interpreter",
                    "pip install torch (needed by the default target; a target of yours may not need it).")
        yield Check("devices", "ok", f"cpu, {cores} cores")
        return
    yield Check("torch", "ok", str(told["version"]))
    devices: list[str] = told["devices"]
    if devices:
        yield Check("devices", "ok", ", ".join(f"cuda:{i} {name}" for i, name in enumerate(devices)))
    elif shutil.which("nvidia-smi"):
        yield Check("devices", "warning", f"cpu, {cores} cores; torch sees no GPU although nvidia-smi is here",
                    "Install a torch build with CUDA that fits the driver.")
    else:
        yield Check("devices", "ok", f"cpu, {cores} cores")


def _target(repo: Path | None, preset: str) -> tuple[list[Check], config.Config | None]:
    """Checks of the target, and its configuration when that is right."""
    told = []
    try:
        folder = default_target() if repo is None else repo
        if repo is not None:
            location = git.locate(repo)
            dirty = git.is_dirty(location)
            told.append(Check("target", "warning" if dirty else "ok", f"{folder} at {location.head[:12]}"
                              + (", with uncommitted files, which a run does not see" if dirty else ""),
                              "Commit them if they matter." if dirty else ""))
        else:
            told.append(Check("target", "ok", "the default one that comes with ratchet"))
    except UserError as error:
        return [Check("target", "error", error.problem, error.mend)], None
    if repo is not None:
        told += _committed(location, folder)
    try:
        found = config.load(folder, preset)
    except UserError as error:
        return [*told, Check("config", "error", error.problem, error.mend)], None
    chosen = f", preset {found.preset}" if found.preset else ""
    told.append(Check("config", "ok", f"{config.FILE} is valid{chosen}: metric {found.metric.name} "
                      f"({found.metric.direction}), budget {found.budget.amount:g} {found.budget.unit}"))
    return [*told, _tier(found.evaluate)], found


def _committed(location: git.Location, folder: Path) -> list[Check]:
    """A run reads ratchet.toml at the last commit; the file on the disk, which is checked here, may be another."""
    name = f"{location.prefix}/{config.FILE}" if location.prefix else config.FILE
    if not (folder / config.FILE).exists():
        return []  # told by the check of the file itself
    held = git.run(location.toplevel, "ls-tree", "-z", "HEAD", "--", name, bare=False)
    if not held:
        return [Check("commit", "error", f"{config.FILE} is not committed, and a run reads the last commit",
                      f"git add {config.FILE}, and commit.")]
    blob = held.split()[2].decode()
    if git.run(location.toplevel, "hash-object", "--", str((folder / config.FILE).resolve()), bare=False
               ).decode().strip() != blob:
        return [Check("commit", "warning", f"{config.FILE} on the disk, which is checked here, is not the committed "
                      "one that a run reads", "Commit it.")]
    return []


def _tier(evaluate: config.Evaluate) -> Check:
    """How far the number can be trusted, and what would raise it."""
    if evaluate.tier == "sealed":
        text = "sealed: a scorer outside the box computes the number, on text that no patch can read"
        if evaluate.audit:
            return Check("tier", "ok", f"{text}, and audits what advances")
        return Check("tier", "warning", f"{text}; evaluate.audit = 0, so a model that looks ahead would be merged",
                     "Take evaluate.audit out: 128 is the default.")
    if evaluate.tier == "protected":
        return Check("tier", "ok", "protected: your own evaluation prints the number in a second box, from files as "
                     "they were at the start; a patched model could still deceive it",
                     'For the tier "sealed" offer the seam of target_repo/README.md: train.served, data.prepare '
                     "and evaluate.command.")
    return Check("tier", "warning", "reported: the training run prints its own number, and a patch could print a "
                 "better one: read what is merged",
                 'For the tier "protected" set evaluate.tier and evaluate.command, and name the files of the '
                 "evaluation in source.protected.")


def _model(model: config.Model) -> Iterator[Check]:
    """The endpoint is not called: a check must not send anything."""
    try:
        choice = choose("auto", model)
    except UserError as error:
        yield Check("model", "error", error.problem, error.mend)
        return
    yield Check("model", "ok" if choice.kind in MODELS else "warning", choice.note)
    paths = ssl.get_default_verify_paths()
    trusted = bool(paths.cafile) or bool(paths.capath and any(Path(paths.capath).iterdir()))
    if choice.kind in MODELS and config.endpoint(model)[0].startswith("https:") and not trusted:
        yield Check("tls", "warning", "this system trusts no certificate authority, so https calls will fail",
                    "Install the package ca-certificates.")


def _disk(runs: Path) -> Check:
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 1e9
    if not os.access(place, os.W_OK):
        return Check("disk", "error", f"{place} is not writable", "Point --runs to a folder of yours.")
    if free < MIN_FREE_GB:
        return Check("disk", "warning", f"{free:.1f} GB free at {place}", "`ratchet gc` frees old runs.")
    return Check("disk", "ok", f"{free:.1f} GB free at {place}")
