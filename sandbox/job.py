"""The job folder is the interface between the agent and the sandbox.

The caller writes ``job.json`` into an empty folder and starts ``python -m sandbox.supervisor FOLDER``.
The supervisor owns the clock, the limits and the box. Whatever happens it ends by renaming ``result.json``
into place; a folder without ``result.json`` whose supervisor is gone was lost to the machine, not to the job.

    job.json        Job, written by the caller, whole (temp + rename)
    supervisor.pid  which process the supervisor is (``"<pid> <start ticks> <boot id>"``)
    progress.json   Progress, replaced about twice a second: for screens, never for decisions
    log.txt         what the job printed: bounded, control bytes stripped
    weights.safetensors   the last complete weights frame (kept only when ``Job.keep_weights``)
    bulk-SPLIT.npy  float32 [rows, sequence]: nats of each scored token (sealed tier)
    result.json     Result

Units: seconds are wall seconds of the supervisor's monotonic clock unless a name says otherwise; sizes are MiB.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

Fault = Literal["crash", "oom", "nan", "timeout", "no_metric", "non_causal", "behind", "infra"]
"""Why a job gave no valid number. ``infra`` is the machine's fault and is never held against the code; ``behind``: it
was stopped early, as its loss was not ahead of the rival's (sandbox/early.py)."""

WEIGHTS = "weights.safetensors"

Tier = Literal["sealed", "protected", "reported"]
"""Where the number comes from: a trusted scorer, the repo's own restored evaluation, or the job's own print."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits on one job; crossing one kills the whole process tree."""

    wall_seconds: float = 600.0
    memory_mb: int = 8192
    processes: int = 512
    log_mb: int = 4
    scratch_mb: int = 2048
    weights_mb: int = 2048


@dataclass(frozen=True, slots=True)
class Batches:
    """What the harness serves to a job that trains over the wire (see sandbox/wire.py).

    ``tokens`` is a file of little-endian uint16 token ids outside the box. Rows of ``sequence + 1`` ids are
    served in an order fixed by the seed alone.
    """

    tokens: str
    rows: int
    sequence: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How the number is made.

    ``sealed``: ``command`` starts a model server in a fresh box; the trusted scorer sends it rows of each split
    and computes bits per byte. A job of kind ``audit`` asks the same weights again, in boxes that know nothing of the
    first answers. ``protected``: ``command`` runs the repo's own evaluation in a fresh box that sees
    the job's output folder read-only, and prints the metric. ``reported``: no command; the pattern is read from
    the training log.
    """

    tier: Tier
    command: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=dict)
    """Split name -> uint16 token file (sealed tier), never visible inside any box."""
    token_bytes: str = ""
    """uint8 .npy: UTF-8 bytes of each token id, 0 for special tokens."""
    rows: int = 256
    """Rows of each split scored in bulk."""
    audit: int = 128
    """Rows of each split of which an audit scores one prefix each without showing the server what follows."""
    largest: float = 0.0
    """Largest difference of one answer that an audit passes, in nats, if wider than the device's (sandbox/audit.py)."""
    mean: float = 0.0
    """Mean difference that is never held against a model, in nats, if wider than the device's."""
    pattern: str = ""
    """Regular expression with one group: the metric (protected and reported tiers); the last match counts."""
    overlay: str = ""
    """Folder whose files replace those of the source for the evaluation (the protected files at the base commit)."""
    wall_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Job:
    """One training run; or, by its ``kind``, something smaller.

    ``twin`` runs ``source`` and ``twin_source`` in lock step, one batch each in turn. The other two train nothing:
    ``score`` scores the model of ``weights``, ``audit`` asks it about prefixes of text whose whole rows were scored
    before.
    """

    id: str
    source: str
    """Folder of the code under test, bound read-only as the box's working tree."""
    command: tuple[str, ...]
    """argv; a leading ``python`` becomes the interpreter that runs the supervisor."""
    seed: int
    steps: int
    """Batches granted to the job; 0 where the target counts for itself."""
    preset: str = ""
    kind: Literal["train", "twin", "score", "audit"] = "train"
    twin_source: str = ""
    weights: str = ""
    """Weights file to score or to audit, as an earlier run handed them over."""
    bulk: str = ""
    """Folder with the audited run's ``bulk-SPLIT.npy``."""
    reference: str = ""
    """Folder with the same of the incumbent's run on this seed: where a model beats it most is audited too. Empty:
    no such run."""
    device: str = "cpu"
    """``cpu``, ``cuda:N``, or ``cuda:N+M`` for a group of GPUs."""
    shared: bool = False
    """Other jobs of the same caller may use the device meanwhile."""
    threads: int = 1
    batches: Batches | None = None
    data: tuple[str, ...] = ()
    """Extra folders bound read-only at their own path (a foreign repo's training data)."""
    hidden: tuple[str, ...] = ()
    """Files made unreadable in the box (held-out text that lies in the interpreter's own tree)."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the box's otherwise empty environment. Never a secret."""
    evaluation: Evaluation | None = None
    limits: Limits = Limits()
    keep_weights: bool = False
    compile_cache: str = ""
    """Folder of compiled kernels that is copied into the box's own caches at its start. Never written to."""
    keep_compile_cache: bool = False
    """Leave the run's compiled kernels in the job folder's ``compile_cache``. Compiled kernels are code: only for a
    tree that the owner trusts, never for a candidate."""
    rival: tuple[tuple[int, float], ...] = ()
    """Training curve of the run on this seed that this one must not be behind at step ``stop_at``; empty: no stop."""
    stop_at: int = 0
    warm: tuple[str, ...] = ()
    """Modules that a box for this job may have imported before the job is known (sandbox/warm.py). Never one that a
    patch may edit. Empty: a cold start."""
    check: bool = False
    """Fill uninitialised memory with NaN until the first batch, so that an unset parameter shows."""
    max_level: int = 3
    """Highest isolation level to use (tests and ``--level``)."""
    min_level: int = 0
    """Do not run below this level: the fault is then ``infra``. The level is found anew for every job, and a machine
    that is out of memory for a moment must not turn a box into none."""


@dataclass(frozen=True, slots=True)
class Score:
    """Bits per byte of one split (sealed tier), or the metric as read (other tiers, split ``val``)."""

    value: float
    """The number that counts: after an audit the corrected one, else what whole rows gave."""
    bulk: float | None = None
    audit_mean: float | None = None
    """Mean of prefix NLL minus bulk NLL over the audited positions, in nats; None: not audited."""
    audit_max: float | None = None
    audit_se: float | None = None
    targeted_max: float | None = None
    """Largest such difference where the model beats the incumbent most; None: there was nothing to beat."""
    error: float | None = None
    """Standard error of a corrected ``value``, in its unit."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A glance at a running job."""

    phase: Literal["start", "train", "evaluate", "done"]
    step: int
    steps: int
    loss: float | None
    seconds: float
    eta_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Twin:
    """Step cost of ``source`` relative to ``twin_source``, interleaved on one device, and whether they are one."""

    ratio: float
    """Median over steps after the first two of (source step charge / twin step charge)."""
    steps: int
    identical: bool
    """Both handed over byte-identical weights."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended. ``fault is None`` exactly when the number may be used."""

    id: str
    fault: Fault | None
    message: str = ""
    """One line for a person; names the cause of the fault."""
    scores: dict[str, Score] = field(default_factory=dict)
    tier: Tier | None = None
    reported: dict[str, float] = field(default_factory=dict)
    """What the job printed of itself. Shown, never decided on."""
    curve: tuple[tuple[int, float], ...] = ()
    """(step, training loss as reported by the job), thinned to at most 200 points."""
    steps: int = 0
    """Batches that the harness served."""
    tokens: int = 0
    startup_seconds: float = 0.0
    """Start of the box to the first batch request; of a box that waited, from when it was given the job."""
    startup_cpu_seconds: float = 0.0
    """CPU seconds of the box in that time, on every device."""
    first_batch_seconds: float = 0.0
    """Start of the job (its supervisor's, or when a waiting one was given it) to the first batch request."""
    first_step_seconds: float = 0.0
    """From then to the second request: the first step, with all that is done in it for the first time."""
    warm: int = 0
    """Boxes of the job that had waited for it (sandbox/warm.py)."""
    train_seconds: float = 0.0
    """First batch request to the weights (or to the exit)."""
    startup_charge: float = 0.0
    """Start of the box to the second batch request, on the charging clock: imports, the first step, compilation. What a
    box imported while it waited is counted too, so that a warm start and a cold one are charged alike."""
    charge_seconds: float = 0.0
    """Second batch request to the weights, on the charging clock: CPU seconds of the tree on ``cpu``, wall seconds on
    a GPU. For a job that is not served: the whole run."""
    evaluate_seconds: float = 0.0
    evaluate_startup_seconds: float = 0.0
    """Of which from the start of the model server's box, or its being given the job, until the weights are loaded."""
    evaluate_charge: float = 0.0
    """The evaluation's box on the charging clock: code of the patch runs there too."""
    inference_charge: float = 0.0
    """The part of it from the model's being ready to its last answer (sealed tier; 0: not seen)."""
    seconds: float = 0.0
    """The whole job."""
    peak_memory_mb: float = 0.0
    gpu_memory_mb: float = 0.0
    gpu_busy: float | None = None
    """Mean utilisation of the job's GPUs while its boxes ran, 0 to 1, as the driver gives it; None: not seen."""
    gpu_clock_mhz: float = 0.0
    """Median clock of their multiprocessors in looks at which they were in use; 0: not seen."""
    device_fault: str = ""
    """What is wrong with the device itself (sandbox/gpu_watch.py); the fault is then ``infra``."""
    parameters: int = 0
    weights_bytes: int = 0
    weights_sha256: str = ""
    nonfinite: tuple[str, ...] = ()
    """Tensors with NaN or infinity in the handed-over weights."""
    twin: Twin | None = None
    level: int = 0
    """Isolation level that really held (sandbox/box.py)."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    """device, driver, torch, python, ruler: runs whose fingerprints differ are never compared."""
    log_tail: str = ""


JOB, RESULT, PROGRESS = TypeAdapter(Job), TypeAdapter(Result), TypeAdapter(Progress)


def bulk_file(folder: Path, split: str) -> Path:
    """Where the answers on ``split`` of the job in ``folder`` are kept."""
    return folder / f"bulk-{split}.npy"


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` appears whole or not at all, and survives a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:  # a full disk, most of the time: half a file must not keep it full
        temporary.unlink(missing_ok=True)
        raise


def write_job(folder: Path, job: Job) -> None:
    """Create the job folder with its ``job.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "job.json", JOB.dump_json(job, indent=1))


def read_job(folder: Path) -> Job:
    return JOB.validate_json((folder / "job.json").read_bytes())


def read_result(folder: Path) -> Result | None:
    """The result, or None while there is none."""
    try:
        return RESULT.validate_json((folder / "result.json").read_bytes())
    except FileNotFoundError:
        return None


def read_progress(folder: Path) -> Progress | None:
    """The newest glance, or None before the first."""
    try:
        return PROGRESS.validate_json((folder / "progress.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError, ValueError):
        return None
