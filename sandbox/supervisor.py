"""``python -m sandbox.supervisor FOLDER [FD]``: runs the job of one job folder to its end and writes its result.

``python -m sandbox.supervisor --ahead FOLDER``: makes boxes for a job like that of ``job.json`` (sandbox/warm.py) and
waits for one line on its standard input, the folder of the real job, which it then runs. When the input ends instead,
as it does when the agent is gone, so do the boxes and the process.

It owns the clock, the limits and the box; the job owns nothing. It outlives the agent, dies with no child left, and
whatever happens it ends by renaming ``result.json`` into place. SIGTERM stops the job. One of the two broad handlers of
the code is here: what is unexpected and ours becomes the fault ``infra``, never the job's. FD, if given, is the read
end of a pipe: when the other end is closed, the job is stopped, so that it does not outlive whoever holds that.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

from sandbox import audit, gpu, gpu_watch, overlay, process, score, twin, warm, weights
from sandbox import box as boxes
from sandbox.account import Account
from sandbox.faults import JobFault, exception_name, from_exit
from sandbox.fingerprint import fingerprint
from sandbox.job import RESULT, WEIGHTS, Evaluation, Job, Result, Score, read_job, write_atomically
from sandbox.running import RunningBox, start
from sandbox.serve_batches import Trainee, trainee
from sandbox.view import BoxSpec
from sandbox.wire import WireError

GRACE = 1.0
"""Seconds for a job to print its last lines after it handed over its weights; unloading torch alone takes as long."""
CRASH_GRACE = 5.0
"""Seconds for a job that closed the wire to be gone, so that its exit says why."""
FLOAT = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
T = TypeVar("T")
PRINTED = re.compile(rf"^\s*([A-Za-z_][\w./-]{{0,40}})\s*[:=]\s*({FLOAT})\s*$", re.MULTILINE)


class Supervisor:
    """One job from start to result."""

    def __init__(self, folder: Path, job: Job, library_hints: tuple[str, ...] = (), began: float | None = None,
                 ahead: warm.Ahead | None = None) -> None:
        """``began``: start of the job (monotonic); now, if left out. ``ahead``: boxes that wait for it."""
        self.folder, self.job, self._hints = folder, job, library_hints
        self.account = Account(job, folder, time.monotonic() if began is None else began)
        self._boxes: list[RunningBox] = []
        self._ahead = ahead
        self._roots: set[int] = ahead.roots if ahead is not None else set()
        self._gpus: gpu_watch.Watch | None = None
        self._stopped = False
        self._level = boxes.Level.PLAIN

    def run(self) -> Result:
        """Do the job. Job faults are in the result; anything else propagates, with every process ended."""
        signal.signal(signal.SIGTERM, self._stop)
        try:
            self._level = boxes.probe(self.job.max_level)
            self.account.level, self.account.fingerprint = int(self._level), fingerprint(self.job.device)
            self._check()
            self._gpus = gpu_watch.watch(self.job.device, self.folder.parent, self.job.shared)
            if self.job.kind == "twin":
                self._twin()
            elif self.job.kind in ("score", "audit") and self.job.evaluation is not None:
                data = Path(self.job.weights).read_bytes()
                self.account.weights_sha256 = weights.inspect(data).sha256
                (self._evaluate if self.job.kind == "score" else self._audit)(self.job.evaluation, data)
            else:
                handed = self._train()
                if self.job.evaluation is not None:
                    self._evaluate(self.job.evaluation, handed)
        except JobFault as fault:
            self.account.fault, self.account.message = fault.fault, fault.message
        finally:
            for box in self._boxes:
                box.close()
            if self._ahead is not None:
                self._ahead.close()
            self._clean()
            self._judge_gpus()
        return self.account.result()

    def _judge_gpus(self) -> None:
        """A run on a GPU that was not fit for it is void, however it ended."""
        if self._gpus is None:
            return
        complaint = self._gpus.end()
        self.account.gpu_busy, self.account.gpu_clock_mhz = self._gpus.busy, self._gpus.clock_mhz
        if complaint and not self._stopped:
            self.account.fault, self.account.message = "infra", complaint
            self.account.device_fault = complaint

    def _check(self) -> None:
        """Refuse a job that cannot be run as described. Raises JobFault (infra: the caller's mistake)."""
        job, evaluation = self.job, self.job.evaluation
        if self._level < job.min_level:
            why = "; ".join(f"level {int(level)}: {reason}" for level, reason in
                            boxes.explain(job.max_level).refused.items())
            raise JobFault("infra", f"only isolation level {int(self._level)} holds, {job.min_level} is wanted ({why})")
        if (job.kind == "twin" or (evaluation is not None and evaluation.tier == "sealed")) and job.batches is None:
            raise JobFault("infra", "a twin job and a sealed evaluation need served batches")
        if job.kind in ("score", "audit") and (evaluation is None or evaluation.tier != "sealed"):
            raise JobFault("infra", f"a job of kind {job.kind} needs a sealed evaluation")
        if evaluation is not None and evaluation.tier != "reported" and not evaluation.command:
            raise JobFault("infra", f"a {evaluation.tier} evaluation needs a command")
        missing = [number for number in gpu.indices(job.device) if gpu.find(number) is None]
        if missing:
            raise JobFault("infra", f"nvidia-smi finds no GPU {', '.join(map(str, missing))}")

    # -- boxes ---------------------------------------------------------------------------------------------------

    def _start(self, name: str, command: tuple[str, ...], source: Path, wall: float, *, wire: bool, number: int = 0,
               log: str = "log.txt", output_writable: bool = True) -> RunningBox:
        """Start a box. Raises JobFault when the job was stopped meanwhile."""
        if self._stopped:
            raise JobFault("infra", "stopped")
        job = self.job
        if wire and (box := self._warm(command, source, wall, self.folder / log)) is not None:
            return box
        if self._stopped:  # meanwhile
            raise JobFault("infra", "stopped")
        folder = self.folder / "boxes" / name
        folder.mkdir(parents=True, mode=0o755)
        output, keep = None, job.keep_compile_cache and name == "train"
        if job.batches is None or keep:
            output = self.folder / "out"
            output.mkdir(exist_ok=True, mode=0o755)
        cache = job.compile_cache if wire and not keep and name != "evaluate" else ""
        spec = BoxSpec(command, source, folder, boxes.job_uid(number), job.device, job.threads, job.limits,
                       job.environment, job.data, job.hidden, output, output_writable,
                       cache, keep, self._cpus(), self._hints)
        box = start(spec, self._level, self.folder / log, wall, self._roots, wire=wire)
        self._look_after(box)
        self._boxes.append(box)
        if self._stopped:  # the signal came while the box was being started and did not find it
            box.kill("stopped")
        return box

    def _warm(self, command: tuple[str, ...], source: Path, wall: float, log: Path) -> RunningBox | None:
        """A waiting box that took the job over; None: there is none, or the job must start cold."""
        wanted = warm.key(self.job)
        if self._ahead is None or wanted is None or wanted != warm.key(self._ahead.job):
            return None
        while self._ahead.boxes and not self._stopped:
            waiting = self._ahead.boxes.pop(0)
            self._boxes.append(waiting.box)  # from here on a signal finds it
            box = warm.hand_over(waiting, command, source, log, wall, self._cpus())
            if box is not None:
                self.account.warm += 1
                self._look_after(box)
                if self._stopped:
                    box.kill("stopped")
                return box
            self._boxes.remove(waiting.box)
        return None

    def _look_after(self, box: RunningBox) -> None:
        """One box at a time looks at the job's GPUs: of a twin job the first."""
        if not any(other.gpus is not None and not other.ended.is_set() for other in self._boxes):
            box.gpus = self._gpus

    def _cpus(self) -> frozenset[int]:
        """The same processors for both sides of a twin job on ``cpu``: they never run at once, so they share the
        weather of one core. Any processor for all else."""
        if self.job.kind != "twin" or self.job.device != "cpu":
            return frozenset()
        allowed = sorted(os.sched_getaffinity(0))
        return frozenset(allowed[(os.getpid() + number) % len(allowed)] for number in range(self.job.threads))

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM: the running boxes are killed, which ends whatever the main thread waits for."""
        self._stopped = True
        for box in self._boxes:
            box.kill("stopped")

    def _diagnose(self, box: RunningBox, what: str, secret: bool = False) -> JobFault:
        """The fault of a box that ended before it gave what was due. ``secret``: its log must not be quoted."""
        limits = box.spec.limits
        if self._stopped:
            return JobFault("infra", "stopped")
        killed = {
            "timeout": JobFault("timeout", f"{what} was over the wall limit of {box.wall_seconds:g} s"),
            "memory": JobFault("oom", f"{what} was over the memory limit of {limits.memory_mb} MiB"),
            "log": JobFault("crash", f"{what} printed far more than its log limit of {limits.log_mb} MiB"),
            "output": JobFault("crash", f"{what} wrote more than its disk limit of {limits.scratch_mb} MiB"),
            "processes": JobFault("crash", f"{what} had more than {limits.processes} processes"),
            "device": JobFault("infra", self._gpus.complaint if self._gpus is not None else ""),
            "watch": JobFault("infra", "the watch over the box failed; see supervisor.log"),
        }.get(box.reason or "")
        if killed is not None:
            return killed
        tail = box.log.tail()
        if not box.executed:
            return JobFault("infra", f"the box could not be set up: {' '.join((box.trouble or tail).split())[-300:]}")
        if box.returncode == 0:
            return JobFault("no_metric", f"{what} ended without handing over what was due")
        fault = from_exit(box.returncode, tail)
        return JobFault(fault.fault, f"{what} failed: {exception_name(tail) or box.returncode}") if secret else fault

    def _lost(self, box: RunningBox, error: WireError, what: str, side: Trainee | None = None, *,
              secret: bool = False) -> JobFault:
        """The fault behind a broken wire: mostly the process is gone, or is being killed at a limit."""
        if side is not None and (fault := self._not_finite(side)) is not None:
            return fault
        # a process that crashed closes its socket first and is gone when torch is unloaded
        if box.ended.wait(CRASH_GRACE) or box.reason is not None:
            box.ended.wait(15)
            return self._diagnose(box, what, secret)
        return JobFault("crash", f"{what} broke off the exchange: {error}")

    # -- training ------------------------------------------------------------------------------------------------

    def _train(self) -> bytearray | None:
        """Train; the weights if the job is served. Raises JobFault."""
        job = self.job
        reaped = process.reaped_cpu_seconds()
        box = self._start("train", job.command, Path(job.source), job.limits.wall_seconds, wire=job.batches is not None)
        box.watch(self.account.glance)
        try:
            if job.batches is not None:
                return self._served(box)
            self._unserved(box, reaped)
            return None
        finally:
            self._end(box)

    def _end(self, box: RunningBox) -> None:
        """Close a training box and note what it leaves: log, memory, what it printed of itself."""
        box.close()
        account = self.account
        account.log_tail = box.log.tail(4096)
        account.peak_memory_mb = max(account.peak_memory_mb, box.peak_memory_mb)
        account.gpu_memory_mb = max(account.gpu_memory_mb, box.gpu_memory_mb)
        printed = {name: float(value) for name, value in PRINTED.findall(box.log.tail())[-50:]}
        account.reported |= {name: value for name, value in printed.items() if math.isfinite(value)}

    def _served(self, box: RunningBox) -> bytearray:
        """The wire side of a training run, from settings to checked weights. Raises JobFault."""
        side = self._side(box)
        clock = self._charging_clock(box)
        # a tree's CPU seconds start at nought; what a box did while it waited is in them, so it is in wall seconds too
        origin = 0.0 if self.job.device == "cpu" else box.began - box.ahead
        try:
            side.begin()
            event = side.listen()
            self._started(box, time.monotonic())
            first, charged = time.monotonic(), clock()
            try:
                while not isinstance(event, bytearray):
                    side.answer(event)
                    event = side.listen()
                    if side.served == 1:
                        # what is done before the second request is charged apart: imports and compilation are in it
                        charged = clock()
                        self.account.startup_charge = charged - origin
                        self.account.first_step_seconds = time.monotonic() - first
            finally:
                self.account.train_seconds = time.monotonic() - first
                self.account.charge_seconds = clock() - charged
                self.account.note(side)
        except WireError as error:
            raise self._lost(box, error, "the job", side) from error
        if side.served == 0:
            raise JobFault("no_metric", "weights were handed over without a single batch")
        box.finish(GRACE)
        return self._take(event, side)

    def _started(self, box: RunningBox, now: float) -> None:
        """Note what came before the first batch request, which is in."""
        account = self.account
        account.startup_seconds, account.first_batch_seconds = now - box.began, now - account.began
        account.startup_cpu_seconds = box.clock.read() - box.cpu_ahead

    def _side(self, box: RunningBox) -> Trainee:
        assert box.sock is not None and self.job.batches is not None
        return trainee(box.sock, self.job, self.job.batches, self.account.on_step)

    def _charging_clock(self, box: RunningBox) -> Callable[[], float]:
        """CPU seconds of the tree on ``cpu`` (a busy machine does not change them), wall seconds on a GPU."""
        return box.clock.read if self.job.device == "cpu" else time.monotonic

    def _not_finite(self, side: Trainee) -> JobFault | None:
        """The fault ``nan`` if the last loss that the job reported was NaN or infinite."""
        if side.loss is None or math.isfinite(side.loss) or self._stopped:
            return None
        return JobFault("nan", f"the training loss became {side.loss} by step {side.served}")

    def _take(self, data: bytearray, side: Trainee) -> bytearray:
        """Check the weights, keep them where asked, and note their facts. Raises JobFault."""
        try:
            facts = weights.inspect(data)
        except weights.BadWeights as error:
            raise JobFault("crash", f"the weights are not valid safetensors: {error}") from error
        account = self.account
        account.parameters, account.weights_bytes, account.weights_sha256 = facts.parameters, facts.size, facts.sha256
        account.nonfinite = facts.nonfinite
        if self.job.keep_weights:
            write_atomically(self.folder / WEIGHTS, bytes(data))
        if facts.nonfinite:
            raise JobFault("nan", f"{len(facts.nonfinite)} weight tensors hold NaN or infinity, "
                                  f"first {facts.nonfinite[0]!r}")
        fault = self._not_finite(side)
        if fault is not None:
            raise fault
        return data

    def _unserved(self, box: RunningBox, reaped: float) -> None:
        """A job that counts for itself: wait for its end. Charged from its start to its exit. Raises JobFault."""
        self.account.phase = "train"
        box.ended.wait()
        self.account.train_seconds = self.account.charge_seconds = box.seconds
        if self.job.device == "cpu":
            # The tree is reaped, so getrusage has all of it but children that were never credited; the clock saw them.
            self.account.charge_seconds = max(process.reaped_cpu_seconds() - reaped, box.clock.read())
        if box.returncode != 0 or box.reason is not None:
            raise self._diagnose(box, "the job")

    # -- twin ----------------------------------------------------------------------------------------------------

    def _twin(self) -> None:
        """Both trees in lock step: what a step of each costs, and whether they do the same. Raises JobFault."""
        job = self.job
        for number, source in enumerate((job.source, job.twin_source)):
            self._start(("source", "twin")[number], job.command, Path(source), job.limits.wall_seconds, wire=True,
                        number=number, log=("log.txt", "twin.txt")[number])
        ours, theirs = (self._walker(box, name) for box, name in zip(self._boxes, ("the job", "the twin"), strict=True))
        theirs.side.on_step = lambda step, loss: None
        self._boxes[0].watch(self.account.glance)
        self._boxes[1].watch(lambda: None)
        try:
            self.account.twin = twin.lock_step(ours, theirs)
        finally:
            self.account.note(ours.side)
            self.account.startup_seconds = max(ours.began - self._boxes[0].began, 0.0)
            self.account.first_batch_seconds = max(ours.began - self.account.began, 0.0)
            self.account.charge_seconds, self.account.train_seconds = ours.charge_seconds, ours.train_seconds
            self._end(self._boxes[0])
        assert ours.weights is not None
        self._take(ours.weights, ours.side)

    def _walker(self, box: RunningBox, name: str) -> twin.Walker:
        side = self._side(box)
        return twin.Walker(side, self._charging_clock(box), self.job.device == "cpu",
                           lambda: box.finish(GRACE), lambda error: self._lost(box, error, name, side))

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, evaluation: Evaluation, data: bytes | bytearray | None) -> None:
        """Make the number in the way of its tier. Raises JobFault."""
        began = time.monotonic()
        self.account.tier = evaluation.tier
        if evaluation.tier == "reported":
            self.account.scores = {"val": _metric(evaluation.pattern, (self.folder / "log.txt"))}
            return
        self.account.phase = "evaluate"
        try:
            if evaluation.tier == "sealed":
                assert data is not None and self.job.batches is not None
                texts = score.held_out(evaluation, self.job.batches)
                self.account.scores = self._ask("evaluate", evaluation, data, lambda server: score.score(
                    server, texts, self.folder, self.account.on_split))
            else:
                self._protected(evaluation)
        finally:
            self.account.evaluate_seconds = time.monotonic() - began

    def _protected(self, evaluation: Evaluation) -> None:
        """Protected tier: the repo's own evaluation, with its protected files as they were. Raises JobFault."""
        source = Path(self.job.source)
        if evaluation.overlay:
            source = overlay.merge(source, Path(evaluation.overlay), self.folder / "merged")
        box = self._start("evaluate", evaluation.command, source, evaluation.wall_seconds, wire=False,
                          log="evaluate.txt", output_writable=False)
        box.watch(self.account.glance)
        try:
            box.ended.wait()
            if box.returncode != 0 or box.reason is not None:
                raise self._diagnose(box, "the evaluation", secret=True)
            self.account.scores = {"val": _metric(evaluation.pattern, self.folder / "evaluate.txt")}
        finally:
            self.account.evaluate_charge = self._used(box)
            box.close()

    def _ask(self, name: str, evaluation: Evaluation, data: bytes | bytearray, ask: Callable[[score.Server], T]) -> T:
        """What the trusted ``ask`` gets out of a model server with these weights, in a fresh box. Raises JobFault.

        The server has seen held-out text and may have printed it, so its log does not stay.
        """
        assert self.job.batches is not None
        box = self._start(name, evaluation.command, Path(self.job.source), evaluation.wall_seconds, wire=True,
                          log=f"{name}.txt", output_writable=False)
        assert box.sock is not None
        box.watch(self.account.glance)
        try:
            server = score.greet(box.sock, self.job, self.job.batches, data)
            self.account.evaluate_startup_seconds += time.monotonic() - box.began
            ready = self._used(box)
            found = ask(server)
            self.account.inference_charge += self._used(box) - ready
            return found
        except WireError as error:
            raise self._lost(box, error, "the model server", secret=True) from error
        finally:
            self.account.evaluate_charge += self._used(box)
            box.close()
            (self.folder / f"{name}.txt").unlink(missing_ok=True)

    def _used(self, box: RunningBox) -> float:
        """Seconds of an evaluation's box on the charging clock."""
        return box.clock.read() if self.job.device == "cpu" else time.monotonic() - box.began + box.ahead

    def _audit(self, evaluation: Evaluation, data: bytes) -> None:
        """Ask the weights of an earlier run again, in boxes that know nothing of its answers. Raises JobFault."""
        assert self.job.batches is not None
        began = time.monotonic()
        account = self.account
        account.phase, account.tier = "evaluate", "sealed"
        try:
            account.scores, complaint = audit.audit(
                self.job, evaluation, score.held_out(evaluation, self.job.batches),
                lambda name, question: self._ask(name, evaluation, data, question))
        finally:
            account.evaluate_seconds = time.monotonic() - began
        if complaint:
            raise JobFault("non_causal", complaint)

    def _clean(self) -> None:
        """Remove what only this job needed, and be sure that nothing of it runs."""
        if self.job.keep_compile_cache and (self.folder / "out").exists():
            for path in (self.folder / "out").rglob("*"):  # the next job has another user id
                if not path.is_symlink():
                    path.chmod(0o755 if path.is_dir() else 0o644)
            (self.folder / "out").chmod(0o755)
            (self.folder / "out").rename(self.folder / "compile_cache")
        for name in ("boxes", "merged", *(() if self.job.keep_weights else ("out",))):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def _metric(pattern: str, log: Path) -> Score:
    """The last match of ``pattern`` in a log. Raises JobFault when there is none or it is no finite number."""
    matches = re.findall(pattern, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if not matches:
        raise JobFault("no_metric", f"nothing printed matches {pattern!r}")
    text = matches[-1] if isinstance(matches[-1], str) else matches[-1][0]
    try:
        value = float(text)
    except ValueError as error:
        raise JobFault("no_metric", f"{pattern!r} found {text[:40]!r}, which is no number") from error
    if not math.isfinite(value):
        raise JobFault("nan", f"the metric is {value}")
    return Score(value)


def supervise(folder: Path, library_hints: tuple[str, ...] = (), ahead: warm.Ahead | None = None) -> Result:
    """Run the job in ``folder`` and write its result; never raises for a job's sake. ``ahead``: boxes that wait."""
    process.become_subreaper()
    began = time.monotonic() - (warm.age() if ahead is None else 0.0)
    try:
        result = Supervisor(folder, read_job(folder), library_hints, began, ahead).run()
    except Exception as error:  # the supervisor's edge: ours, hence infra, with the traceback in its log
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        result = Result(folder.name, "infra", text, seconds=time.monotonic() - began)
    write_atomically(folder / "result.json", RESULT.dump_json(result, indent=1))
    return result


def _hold(lifeline: int) -> None:
    """Stop the job when the lifeline is cut."""
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def wait_ahead(folder: Path, library_hints: tuple[str, ...]) -> None:
    """Make boxes ahead, wait for a job on standard input, and run it in them; or end with them when none comes."""
    process.become_subreaper()
    ahead = warm.prepare(folder, read_job(folder), library_hints)
    # without the boxes that it should have, a cold start finds the level anew
    named = warm.await_job(ahead, sys.stdin) if ahead.boxes else ""
    if not named:
        ahead.close()
        return
    job = Path(named)
    with (job / "supervisor.log").open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    _sign(job)
    supervise(job, library_hints, ahead)


def _sign(folder: Path) -> None:
    own = process.stat(os.getpid())
    if own is not None:
        write_atomically(folder / "supervisor.pid", process.name_of(os.getpid(), own).encode())


def main(argv: list[str]) -> int:
    """Command line: the job folder, and the lifeline if there is one; or ``--ahead`` and the folder of boxes made
    ahead."""
    ahead = argv[0] == "--ahead"
    folder = Path(argv[int(ahead)]).resolve()
    for text in argv[1 + int(ahead):]:
        threading.Thread(target=_hold, args=(int(text),), daemon=True).start()
    hints = tuple(part for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part)
    _sign(folder)
    if ahead:
        wait_ahead(folder, hints)
    else:
        supervise(folder, hints)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
