"""What a job has come to so far: filled by the supervisor as it goes, turned into a Result at the end.

Kept apart so that a job which faults half-way still reports the steps, seconds and memory that it had used.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sandbox.job import PROGRESS, Fault, Job, Progress, Result, Score, Tier, Twin
from sandbox.serve_batches import Trainee


@dataclass(slots=True)
class Account:
    """Mutable, one a job. Fields carry the names and units of Result."""

    job: Job
    folder: Path
    began: float = field(default_factory=time.monotonic)
    phase: Literal["start", "train", "evaluate", "done"] = "start"
    fault: Fault | None = None
    message: str = ""
    level: int = 0
    fingerprint: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    tier: Tier | None = None
    reported: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    tokens: int = 0
    startup_seconds: float = 0.0
    startup_cpu_seconds: float = 0.0
    first_batch_seconds: float = 0.0
    first_step_seconds: float = 0.0
    warm: int = 0
    train_seconds: float = 0.0
    startup_charge: float = 0.0
    charge_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    evaluate_startup_seconds: float = 0.0
    evaluate_charge: float = 0.0
    inference_charge: float = 0.0
    peak_memory_mb: float = 0.0
    gpu_memory_mb: float = 0.0
    gpu_busy: float | None = None
    gpu_clock_mhz: float = 0.0
    device_fault: str = ""
    parameters: int = 0
    weights_bytes: int = 0
    weights_sha256: str = ""
    nonfinite: tuple[str, ...] = ()
    twin: Twin | None = None
    log_tail: str = ""
    _loss: float | None = None
    _first_step: float = 0.0
    _share: float = 0.0

    def on_step(self, step: int, loss: float | None) -> None:
        """A batch was served, or the job reported a loss."""
        if self.phase == "start":
            self.phase, self._first_step = "train", time.monotonic()
        self.steps, self._loss = step, loss

    def on_split(self, done: int, splits: int) -> None:
        """The scorer begins split ``done`` of ``splits``."""
        self._share = done / splits

    def note(self, side: Trainee) -> None:
        """Take over what was counted and reported on the wire."""
        self.steps, self.tokens, self.curve = side.served, side.tokens, tuple(side.curve)
        if side.loss is not None and math.isfinite(side.loss):
            self.reported["loss"] = side.loss

    def glance(self) -> None:
        """Replace progress.json. A screen's glance is not worth an fsync, nor a full disk the job."""
        now = time.monotonic()
        eta = None
        if self.phase == "train" and self.steps > 1 and self.job.steps:
            eta = (now - self._first_step) / self.steps * max(self.job.steps - self.steps, 0)
        loss = self._loss if self._loss is not None and math.isfinite(self._loss) else None
        progress = Progress(self.phase, self.steps, self.job.steps, loss, now - self.began, eta)
        temporary = self.folder / ".progress.json.tmp"
        with contextlib.suppress(OSError):
            temporary.write_bytes(PROGRESS.dump_json(progress))
            temporary.replace(self.folder / "progress.json")

    def result(self) -> Result:
        """The whole account as a Result; the phase becomes ``done``."""
        self.phase = "done"
        self.glance()
        names = Result.__dataclass_fields__.keys() - {"id", "seconds"}
        return Result(id=self.job.id, seconds=time.monotonic() - self.began,
                      **{name: getattr(self, name) for name in names})
