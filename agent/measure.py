"""Measure: a Run of a tree on a slot -> the sandbox's Result. Also the slots: which device is busy with what."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent import audits
from agent.errors import UserError
from agent.git import matches
from agent.ledger import State
from agent.records import Purpose, Result, Run
from agent.rests import Rests
from agent.site import SPLITS, Site
from sandbox import gpu, gpu_watch
from sandbox.engine import Engine, EngineError
from sandbox.job import WEIGHTS, Batches, Evaluation, Job, Limits, Progress, bulk_file
from sandbox.view import inner_device


def new_run(site: Site, purpose: Purpose, commit_tree: str, seed: int, steps: int, device: str,
            candidate: str | None, known: Collection[str]) -> Run:
    """A run with an id that says what it is: ``<tree>-s<seed>-n<steps>``, with a counter when it is a repeat."""
    name = new_name(f"{commit_tree[:12]}-{'preflight' if purpose == 'preflight' else f's{seed}-n{steps}'}", known)
    splits = {"preflight": (), "final": ("final",)}.get(purpose, ("val", "confirm"))
    return Run(name, purpose, commit_tree, seed, steps, device, f"jobs/{name}", candidate, splits)


def audit_of(run: Run, known: Collection[str], device: str = "") -> Run:
    """The audit of ``run``, on its own device unless another is given, as ``<run>-audit``."""
    name = new_name(f"{run.id}-audit", known)
    return dataclasses.replace(run, id=name, purpose="audit", folder=f"jobs/{name}", audits=run.id,
                               device=device or run.device)


def new_name(stem: str, known: Collection[str]) -> str:
    """``stem``, with a counter if that is known already."""
    name, count = stem, 1
    while name in known:
        count += 1
        name = f"{stem}.{count}"
    return name


def audit_job(site: Site, run: Run, audited: Run, source: Path, tolerance: tuple[float, float],
              incumbent: Run | None = None) -> Job:
    """The sandbox's job for an audit. ``incumbent``: its run on the same seed, if there is one to compare with."""
    whole = job_of(site, run, source)
    assert whole.evaluation is not None
    place = site.folder / audited.folder
    other = site.folder / incumbent.folder if incumbent is not None else None
    known = other is not None and all(bulk_file(other, split).exists() for split in run.splits)  # not freed meanwhile
    return dataclasses.replace(
        whole, kind="audit", weights=str(place / WEIGHTS), bulk=str(place), reference=str(other) if known else "",
        evaluation=dataclasses.replace(whole.evaluation, largest=tolerance[0], mean=tolerance[1]))


def forget_weights(site: Site, runs: Iterable[Run]) -> None:
    """Delete the weights of runs that nobody will audit any more."""
    for run in runs:
        (site.folder / run.folder / WEIGHTS).unlink(missing_ok=True)


def compile_cache(site: Site, state: State) -> Path | None:
    """Compiled kernels left by the first incumbent's first run, which every later run may start from."""
    if not site.on_gpus or state.campaign.get("previous"):
        return None
    for run in state.runs.values():
        place = site.folder / run.folder / "compile_cache"
        if keeps_cache(site, state, run) and run.id in state.results and place.exists():
            return place
    return None


def keeps_cache(site: Site, state: State, run: Run) -> bool:
    """Whether ``run`` may leave its compiled kernels to others: on a GPU, only for the owner's own commit, and of a
    target that leaves its weights on the wire: others need the place where the kernels would be kept for their output.
    """
    return (site.config.train.served and run.purpose == "baseline" and gpu.index(run.device) is not None
            and run.seed == site.config.seeds.first and not state.merges and not state.campaign.get("previous"))


def job_of(site: Site, run: Run, source: Path, incumbent: Path | None = None, cache: Path | None = None,
           keep_cache: bool = False) -> Job:
    """The sandbox's job for ``run``. With ``incumbent`` it is a tiny run of both trees in lock step (preflight)."""
    config, data = site.config, site.data
    batches = None
    if config.train.served and data is not None:
        batches = Batches(str(data.folder / "train.bin"), data.rows, data.sequence, data.vocab)
    limits = config.limits
    return Job(
        id=run.id, source=str(source), command=_command(site, run, config.train.command), seed=run.seed,
        steps=run.steps, preset=config.preset, kind="twin" if incumbent else "train",
        twin_source=str(incumbent or ""), device=run.device, threads=config.train.threads, batches=batches,
        data=tuple(str((source / folder).resolve()) for folder in config.train.data),
        hidden=(*data.hidden, *(str(data.folder / f"{name}.bin") for name in SPLITS)) if data else (),
        environment=dict(config.train.environment),
        evaluation=None if run.purpose == "preflight" else _evaluation(site, run, source),
        limits=Limits(limits.wall_seconds, limits.memory_mb, limits.processes, limits.log_mb, limits.scratch_mb,
                      limits.weights_mb),
        keep_weights=run.trains and run.purpose != "weigh" and audits.wanted(config),
        compile_cache=str(cache or ""), keep_compile_cache=keep_cache and cache is None,
        warm=tuple(config.train.warm), shared=shared(site, run.device), check=run.purpose == "preflight",
        max_level=site.level, min_level=site.least_level)


def _command(site: Site, run: Run, text: str) -> tuple[str, ...]:
    """argv of a command line of the config. ``{out}`` is left to the sandbox, which alone knows the box."""
    budget = site.config.budget
    values = {"seed": str(run.seed), "steps": str(run.steps), "seconds": f"{budget.amount:g}",
              "preset": site.config.preset, "device": inner_device(run.device),
              "gpus": str(gpu.count(run.device))}
    words = shlex.split(text)
    for name, value in values.items():
        words = [word.replace("{" + name + "}", value) for word in words]
    return tuple(words)


def _evaluation(site: Site, run: Run, source: Path) -> Evaluation:
    """Where the number comes from, by tier. The sealed tier never shows the splits to any box."""
    evaluate, data = site.config.evaluate, site.data
    command = _command(site, run, evaluate.command)
    if evaluate.tier == "sealed" and data is not None:
        return Evaluation(
            "sealed", command, {name: str(data.folder / f"{name}.bin") for name in SPLITS if name in run.splits},
            str(data.folder / "token_bytes.npy"), evaluate.rows, evaluate.audit, wall_seconds=evaluate.seconds)
    overlay = str(_protected_files(site)) if evaluate.tier == "protected" else ""
    return Evaluation(evaluate.tier, command, pattern=evaluate.pattern, overlay=overlay, wall_seconds=evaluate.seconds)


def _protected_files(site: Site) -> Path:
    """The protected files of the start commit in a folder of their own: they are laid over the candidate's source."""
    whole = site.source(site.start)
    place = site.folder / "source" / "protected"
    if not place.exists():
        partial = place.with_name("protected.new")
        for path in sorted(whole.rglob("*")):
            name = path.relative_to(whole)
            if path.is_file() and matches(str(name), site.config.source.protected):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(path.read_bytes())
        partial.mkdir(parents=True, exist_ok=True)
        partial.rename(place)
    return place


def idle_cores(site: Site) -> int:
    """Jobs of a CPU target that fit on cores which its slots leave idle: 0 on GPUs and on other machines, where a job
    beside a training run would slow it, or is not ours to place."""
    if any(device != "cpu" for device in site.devices):
        return 0
    return max(0, min(len(site.devices), len(_cores()) // site.config.train.threads - len(site.devices)))


def _cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


STAT = Path("/proc/stat")


class Load:
    """Cores that nobody used lately, as the kernel counted: trainers that wait for something leave some idle, though
    there are as many slots as cores."""

    WINDOW, STALE = 1.0, 4.0
    """Seconds over which it is measured, at least and at most."""

    def __init__(self) -> None:
        self._cores, self._idle = _cores(), 0.0
        self._looked, self._counted = time.monotonic(), self._count()

    def idle(self) -> float:
        """Idle cores over the last window; 0 before the first has passed, and where nobody looked for long."""
        now = time.monotonic()
        taken = now - self._looked
        if taken >= self.WINDOW:
            counted = self._count()
            self._idle = (counted - self._counted) / taken if taken <= self.STALE else 0.0
            self._looked, self._counted = now, counted
        return self._idle

    def _count(self) -> float:
        """Idle seconds of these cores since the machine was started."""
        try:
            lines = STAT.read_text(encoding="ascii").splitlines()
        except OSError:  # no Linux: by their order
            return sum(one.idle for number, one in enumerate(psutil.cpu_times(percpu=True)) if number in self._cores)
        known = {words[0]: int(words[4]) + int(words[5]) for words in map(str.split, lines) if words[0][:3] == "cpu"}
        return sum(known.get(f"cpu{core}", 0) for core in self._cores) / os.sysconf("SC_CLK_TCK")


def shared(site: Site, device: str) -> bool:
    """Whether several slots use the same device."""
    return site.devices.count(device) > 1


def _light(run: Run) -> bool:
    return run.purpose in ("preflight", "audit")


@dataclass(slots=True)
class Slot:
    """A device that runs one job at a time."""

    device: str
    run: Run | None = None
    beside: bool = False
    """For tiny runs and audits alone, on cores that no training uses."""
    spare: bool = False
    """One beside that is used only while a core is seen to be idle."""


class Slots:
    """The devices that an engine offers and the jobs on them. One job a slot; whoever asks waits here, nowhere else."""

    def __init__(self, site: Site, engine: Engine, beside: int | None = None) -> None:
        """``beside``: places for jobs that are no training runs, besides the slots (``idle_cores``); where that is 0,
        one for the time that a core is seen to be idle, if there are more cores than a job takes: two jobs that share
        their only core end in an order that chance decides. None: no such place."""
        self._site, self._engine = site, engine
        self.rests = Rests(lambda device: gpu_watch.ask(device, site.folder / "jobs", shared(site, device)))
        self._slots = [Slot(device) for device in site.devices] + [
            Slot(site.devices[0], beside=True) for _ in range(beside or 0)]
        if (beside == 0 and all(device == "cpu" for device in site.devices)
                and len(_cores()) > site.config.train.threads):
            self._slots.append(Slot(site.devices[0], beside=True, spare=True))
        self._load = Load()

    @property
    def busy(self) -> list[Run]:
        return [slot.run for slot in self._slots if slot.run]

    @property
    def idle(self) -> int:
        """Slots without a job, but for those beside."""
        return sum(slot.run is None and not slot.beside for slot in self._slots)

    def free(self, device: str = "", light: bool = False) -> str | None:
        """A device without a job (the given one, if any), or None. ``light``: for a tiny run or an audit."""
        slot = self._free(device, light)
        return slot.device if slot else None

    def home(self, seed: int) -> str:
        """The device of a seed: the same for all its runs, until that is given up; then another one.

        Raises UserError when none is left.
        """
        devices = self._site.devices
        first = devices[seed % len(devices)]
        if not self.rests.given_up(first):
            return first
        left = [device for device in devices if not self.rests.given_up(device)]
        if not left:
            raise UserError(f"No device is left to train on: {self.rests.given_up(first)}.",
                            "See nvidia-smi; once it is mended, the same command goes on where it stopped.")
        return left[seed % len(left)]

    def _free(self, device: str, light: bool, offered: bool = False) -> Slot | None:
        """A light job goes beside the slots where it can. ``offered``: the spare place was seen to be free just now,
        and is not looked at again."""
        fit = [slot for slot in self._slots if slot.run is None and device in ("", slot.device)
               and (light or not slot.beside) and not self.rests.rests(slot.device)
               and (not slot.spare or offered or self._load.idle() > self._site.config.train.threads)]
        return max(fit, key=lambda slot: slot.beside, default=None)

    def start(self, run: Run, job: Job) -> None:
        """Start ``job`` on a free slot of its device. Raises UserError for what the user must mend."""
        slot = self._free(run.device, _light(run), offered=True)
        assert slot is not None, "start() was called without a free slot"
        try:
            self._engine.start(self._site.folder / run.folder, job)
        except EngineError as error:
            raise UserError(error.problem, error.mend) from error
        slot.run = run

    def attach(self, run: Run) -> Result | None:
        """Take over a job that an earlier ratchet process started. Its result if it has ended, as lost if need be;
        so it is ended when no slot is free for it."""
        folder = self._site.folder / run.folder
        slot = self._free(run.device, _light(run), offered=True)
        result = self._engine.poll(folder)
        if result is None and slot is None:
            self._engine.stop(folder)
            result = self._engine.poll(folder)
        if result is None and slot is not None:
            slot.run = run
        return result

    def wait(self, seconds: float) -> list[tuple[Run, Result]]:
        """Jobs that ended, waiting at most ``seconds`` for the first."""
        deadline = time.monotonic() + seconds
        while True:
            ended: list[tuple[Run, Result]] = []
            for slot in self._slots:
                result = self._engine.poll(self._site.folder / slot.run.folder) if slot.run else None
                if slot.run and result is not None:
                    ended.append((slot.run, result))
                    self.rests.heard(slot.run, result)
                    slot.run = None
            left = deadline - time.monotonic()
            if ended or left <= 0:
                return ended
            self._engine.rest([self._site.folder / run.folder for run in self.busy], left)

    def stop(self, runs: list[Run]) -> None:
        """Ask the sandbox to end these jobs; they then end with fault infra."""
        for run in runs:
            self._engine.stop(self._site.folder / run.folder)

    def close(self) -> None:
        """No further job will come: what the sandbox keeps ready for one ends."""
        self._engine.close()

    def progress(self) -> list[tuple[Run, Progress | None]]:
        return [(run, self._engine.progress(self._site.folder / run.folder)) for run in self.busy]
