"""Ground: a throwaway campaign in which a bench trains trees, by the very code that a real campaign uses.

The folder lies in ``RUNS/.bench`` and goes when the bench ends; the prepared data in ``RUNS/.data`` are shared with
the campaigns and stay. As in a campaign, only what is committed in the target's repository is measured. Does not
cover charging: both arms of a pair get the same number of steps, and what a step costs is reported instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import git, patch, resources, site
from agent.errors import UserError
from agent.ideas import Card
from agent.measure import Slots, job_of, new_name, new_run
from agent.policy import PatchRefused
from agent.records import Edit, Proposal, Run
from agent.site import SPLITS, Site
from sandbox.engine import LocalEngine
from sandbox.job import Job, Result, read_result

READY_SECONDS = 120.0
INFRA_TRIES = 3
"""Times a run is started before the machine is blamed."""
STEPPED = ("steps", "charged_steps")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One training run that a bench asks for."""

    commit: str
    seed: int
    steps: int
    label: str
    scored: bool = True
    """False: no evaluation."""
    keep_weights: bool = False
    level: int | None = None
    """Highest isolation level; None: the site's."""
    warm: bool = True
    """False: a cold start, whatever the target has imported ahead."""


@dataclass(slots=True)
class Ground:
    """The site, its slots, and a voice (``say``: one line of progress, never on standard output)."""

    site: Site
    say: Say
    engine: LocalEngine = field(default_factory=LocalEngine)
    known: set[str] = field(default_factory=set)
    """Names of runs that are taken."""
    _runs: dict[str, Run] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """The commit that everything is measured against."""
        return self.site.start

    def steps(self, asked: int) -> int:
        """``asked``, or the preset's own number; 0 where the target counts for itself. Raises UserError."""
        budget = self.site.config.budget
        if budget.unit in STEPPED:
            return asked or int(budget.amount)
        if asked:
            raise UserError(f"The target is budgeted in {budget.unit}, so --steps says nothing.", "Leave it out.")
        return 0

    def variant(self, cards: Sequence[Card], base: str) -> str:
        """The commit of ``cards`` applied one after the other on ``base``. Raises UserError when one does not fit."""
        for card in cards:
            edits = tuple(Edit(edit.path, edit.search, edit.replace) for edit in card.edits)
            proposal = Proposal(card.id, base, card.title, card.mechanism, "ideas", edits, source=card.id)
            try:
                made = patch.build(self.site.repo, self.site.prefix, base, proposal, self.site.config.source,
                                   datetime.datetime.now(datetime.UTC))
            except PatchRefused as refusal:
                where = "the start" if base == self.start else "the cards before it"
                raise UserError(f"Card {card.id} does not apply on {where}: {refusal.reason}",
                                "Leave it out; --apart measures cards that exclude each other.") from refusal
            base = made.head
        return base

    def measure(self, wanted: Sequence[Wanted]) -> list[Result]:
        """Train all ``wanted``, as many side by side as there are slots; results in the order asked for.

        A seed keeps to one device, so that a pair shares it. A faulty run is a result like any other, but the machine's
        own faults are tried again. Raises UserError when the machine goes on failing. Leaves no job behind.
        """
        labels = [asked.label for asked in wanted]
        return self._all(labels, [self._device(asked.seed) for asked in wanted],
                         lambda number, device: self._job(wanted[number], device))

    def warmed(self, wanted: Wanted) -> dict[str, Any] | None:
        """Let boxes wait for a run like ``wanted`` until they are ready: what they hold (``LocalEngine.ready``).

        None when they are not after ``READY_SECONDS``, or when the target does not say what may be warm.
        """
        device = self._device(wanted.seed)
        _, job = self._job(wanted, device)
        jobs = self.site.folder / "jobs"
        jobs.mkdir(exist_ok=True)
        self.engine.prepare(jobs, job)
        deadline = time.monotonic() + READY_SECONDS
        while job.warm and time.monotonic() < deadline:
            if (told := self.engine.ready(device)) is not None:
                return told
            time.sleep(0.05)
        return None

    def finish(self, jobs: Sequence[tuple[Run, Job]], label: str | Sequence[str]) -> list[Result]:
        """Do these jobs as they are, as many side by side as there are slots; results in the order given.

        Raises UserError when the machine goes on failing. Leaves no job behind.
        """
        def again(number: int, device: str) -> tuple[Run, Job]:
            run, job = jobs[number]
            name = new_name(run.id, self.known)
            self.known.add(name)
            self._runs[name] = dataclasses.replace(run, id=name, folder=f"jobs/{name}")
            return self._runs[name], dataclasses.replace(job, id=name)

        labels = [label] * len(jobs) if isinstance(label, str) else label
        return self._all(labels, [run.device for run, _ in jobs], again)

    def _all(self, labels: Sequence[str], devices: Sequence[str],
             make: Callable[[int, str], tuple[Run, Job]]) -> list[Result]:
        """Every job that ``make(number, device)`` gives; one that the machine failed is made again."""
        slots = Slots(self.site, self.engine)
        left, tries = list(range(len(labels))), [0] * len(labels)
        at: dict[str, int] = {}
        found: dict[int, Result] = {}
        try:
            while left or slots.busy:
                for number in list(left):
                    if slots.free(devices[number]):
                        run, job = make(number, devices[number])
                        slots.start(run, job)
                        at[run.id] = number
                        left.remove(number)
                for run, result in slots.wait(5.0):
                    number = at[run.id]
                    tries[number] += 1
                    if result.fault == "infra":
                        if tries[number] >= INFRA_TRIES:
                            raise UserError(f"The machine failed {INFRA_TRIES} times: {result.message}.",
                                            "`ratchet doctor` looks what it lacks.")
                        left.insert(0, number)
                        continue
                    found[number] = result
                    self.say(f"{len(found)}/{len(labels)} {labels[number]} seed {run.seed}: "
                             f"{result.fault or 'done'} in {result.seconds:.1f} s")
        finally:
            slots.stop(slots.busy)
        return [found[number] for number in range(len(labels))]

    def trained(self, wanted: Sequence[Wanted]) -> list[Result]:
        """Like ``measure``, for trees that must train. Raises UserError when one does not."""
        results = self.measure(wanted)
        for asked, result in zip(wanted, results, strict=True):
            if result.fault:
                tail = result.log_tail.strip().splitlines()[-1:]
                raise UserError(f"{asked.label} fails to train on seed {asked.seed} ({result.fault}): "
                                f"{' '.join([result.message, *tail])}.", "Mend it and commit, then measure again.")
        return results

    def runs_on(self) -> str:
        """What the runs so far were made on, by their fingerprints."""
        known = [read_result(self.site.folder / run.folder) for run in self._runs.values()]
        return ", ".join(sorted({result.fingerprint.get("device", "") for result in known if result}))

    def folder(self, result: Result) -> Path:
        """The job folder of a result of this ground."""
        return self.site.folder / "jobs" / result.id

    def run(self, result: Result) -> Run:
        """The run of a result of this ground."""
        return self._runs[result.id]

    def _job(self, wanted: Wanted, device: str) -> tuple[Run, Job]:
        """One training run and its job."""
        tree = git.resolve(self.site.repo, f"{wanted.commit}^{{tree}}", "tree") or wanted.commit
        run: Run = new_run(self.site, "pair", tree, wanted.seed, wanted.steps, device, None, self.known)
        run = dataclasses.replace(run, splits=SPLITS)
        self.known.add(run.id)
        self._runs[run.id] = run
        job = job_of(self.site, run, self.site.source(wanted.commit), cache=self._compiled(),
                     keep_cache=device != "cpu" and wanted.commit == self.start)
        if not wanted.scored:
            job = dataclasses.replace(job, evaluation=None)
        if wanted.level is not None:
            job = dataclasses.replace(job, max_level=wanted.level, min_level=0)
        if not wanted.warm:
            job = dataclasses.replace(job, warm=())
        return run, dataclasses.replace(job, keep_weights=wanted.keep_weights)

    def _compiled(self) -> Path | None:
        """Compiled kernels of the start, once a run of it on a GPU has left some, as in a campaign."""
        places = (self.site.folder / run.folder / "compile_cache" for run in self._runs.values())
        return next((place for place in places if place.exists()), None)

    def _device(self, seed: int) -> str:
        return self.site.devices[seed % len(self.site.devices)]


@contextlib.contextmanager
def scratch(runs: Path, name: str) -> Iterator[Path]:
    """A folder in ``runs/.bench`` that is gone afterwards."""
    above = runs.resolve() / ".bench"
    above.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=f"{name}-") as folder:
            yield Path(folder)
    finally:
        with contextlib.suppress(OSError):  # another bench works beside this one
            above.rmdir()


@contextlib.contextmanager
def open_ground(options: argparse.Namespace, name: str, say: Say, slots: int | None = None) -> Iterator[Ground]:
    """The ground for bench ``name``: clone, configuration, devices, data. ``slots`` overrules the options'.

    Raises UserError for what the user must mend.
    """
    target: Path = options.repo or resources.default_target()
    with scratch(options.runs, name) as folder:
        origin = site.locate(target, packaged=options.repo is None)
        if origin.toplevel and git.is_dirty(git.locate(target)):
            say(f"the target has uncommitted changes: they are not measured, commit {origin.start[:12]} is")
        origin = site.clone(origin, folder, None, "")
        config = site.read_config(folder / "repo.git", origin.start, origin.prefix, options.preset, len(site.gpus()))
        place = Site(folder, origin.prefix, origin.start, config, None,
                     site.find_devices(config, slots or options.slots), options.level, 0)
        data = site.prepare(config, place.source(origin.start), options.runs.resolve() / ".data", say)
        ground = Ground(dataclasses.replace(place, data=data), say)
        try:
            yield ground
        finally:
            ground.engine.close()


def count(text: str) -> int:
    """A number from 1 on, as an option. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
