"""Benches of the machine: what a box costs (``box``), what a run spends before its first step (``startup``), and how
much of a GPU's arithmetic the training uses (``mfu``)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent.bench.finding import Finding
from agent.errors import UserError
from agent.ground import Ground, Say, Wanted, count, open_ground, scratch
from agent.site import find_devices, gpus
from sandbox import box as boxes
from sandbox.job import Limits, Result
from sandbox.view import BoxSpec

TRIVIAL = ("/usr/bin/true",)
PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 or H200 SXM, by NVIDIA's data sheets (the figure with sparsity is twice that)."""

Shapes = Mapping[str, Sequence[int]]


def box_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tries", type=count, default=20, help="boxes started at each level")


def box(options: argparse.Namespace, say: Say) -> Finding:
    """Life of a box around a program that does nothing, at each level that holds on this machine."""
    rows = []
    with scratch(options.runs, "box") as folder:
        source = folder / "source"
        source.mkdir(mode=0o755)
        spec = BoxSpec(TRIVIAL, source, folder, boxes.job_uid(0), limits=Limits(scratch_mb=16))
        for level in _levels(options.level):
            taken = sorted(1000 * _life(spec, level, folder) for _ in range(options.tries))
            rows.append({"level": int(level), "median_ms": statistics.median(taken), "fastest_ms": taken[0],
                         "slowest_ms": taken[-1]})
            say(f"level {int(level)}: {rows[-1]['median_ms']:.1f} ms")
    refused = {str(int(level)): why for level, why in boxes.explain(options.level).refused.items()}
    return Finding(f"start to end of a box around {TRIVIAL[0]}, {options.tries} tries",
                   {"tries": options.tries, "levels": rows, "refused": refused},
                   ("level", "median ms", "fastest", "slowest"),
                   [(f"{row['level']:.0f}", *(f"{row[key]:.1f}" for key in ("median_ms", "fastest_ms", "slowest_ms")))
                    for row in rows], [f"level {level} does not hold here: {why}" for level, why in refused.items()])


def startup_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tries", type=count, default=5, help="runs of one step, and boxes of each kind")
    parser.add_argument("--module", default="torch", help="what the target imports first")


def startup(options: argparse.Namespace, say: Say) -> Finding:
    """What a run spends before its first step, one run at a time: box, interpreter, import, the rest; and at each level
    what a cold and a warm start cost (``starts``), where the target has ``train.warm``."""
    with open_ground(options, "startup", say, slots=1) as ground:
        _served(ground, "startup")
        level = boxes.probe(options.level)
        parts = {
            "plain_ms": 1000 * _boxed(ground, TRIVIAL, boxes.Level.PLAIN, options.tries),
            "box_ms": 1000 * _boxed(ground, TRIVIAL, level, options.tries),
            "interpreter_seconds": _boxed(ground, ("python", "-c", ""), level, options.tries),
            "import_seconds": _boxed(ground, ("python", "-c", f"import {options.module}"), level, options.tries)}
        config = ground.site.config
        runs = ground.trained(
            [Wanted(ground.start, config.seeds.first, 1, "start", scored=False, warm=False)] * options.tries)
        levels = [starts(ground, level, options.tries) for level in _levels(options.level)] if config.train.warm else []
    requests = sorted(run.startup_seconds for run in runs)
    request, whole = statistics.median(requests), statistics.median(run.seconds for run in runs)
    facts: dict[str, Any] = {
        "preset": config.preset, "tries": options.tries, "level": runs[0].level, **runs[0].fingerprint, **parts,
        "module": options.module, "first_request_seconds": request, "first_request_range": [requests[0], requests[-1]],
        "rest_seconds": request - parts["import_seconds"], "whole_seconds": whole,
        "levels": levels}
    return Finding(f"before the first step, median of {options.tries}", facts, ("what", "value"), [
        ("a box around nothing, level 0", f"{parts['plain_ms']:.1f} ms"),
        (f"a box around nothing, level {runs[0].level}", f"{parts['box_ms']:.1f} ms"),
        ("interpreter, in the box", f"{parts['interpreter_seconds']:.2f} s"),
        (f"interpreter and import {options.module}, in the box", f"{parts['import_seconds']:.2f} s"),
        ("start of the box to the first request", f"{request:.2f} s ({requests[0]:.2f} to {requests[-1]:.2f})"),
        ("  of which after the import", f"{facts['rest_seconds']:.2f} s"),
        ("whole job of one step, unscored", f"{whole:.2f} s"),
        *[row for found in levels for row in _start_rows(found)]])


START = {"first_batch_seconds": "job to first batch", "startup_cpu_seconds": "CPU before it",
         "first_step_seconds": "job to second batch", "evaluate_startup_seconds": "model server's start",
         "evaluate_seconds": "whole evaluation", "seconds": "whole job"}
"""What ``starts`` tells of a start, as medians in seconds: wall, but for ``startup_cpu_seconds``."""


def starts(ground: Ground, level: boxes.Level, tries: int) -> dict[str, Any]:
    """Cold and warm starts at ``level``, in turn, of scored runs of two steps: ``level``, ``cold`` and ``warm`` (each
    START, and ``boxes``: the fewest that had waited), ``same_weights`` (all runs handed over the same bytes), and what
    the waiting boxes hold (``waiting``: ``LocalEngine.ready``; None: none got ready)."""
    found: dict[bool, list[Result]] = {False: [], True: []}
    wanted = Wanted(ground.start, ground.site.config.seeds.first, 2, f"level {int(level)}", level=int(level))
    waiting = None
    for _ in range(tries):
        found[False] += ground.trained([dataclasses.replace(wanted, warm=False, label=f"{wanted.label}, cold")])
        waiting = ground.warmed(wanted)
        found[True] += ground.trained([dataclasses.replace(wanted, label=f"{wanted.label}, warm")])
    ground.engine.close()  # the next cold run has the machine to itself
    return {"level": int(level), "cold": _start(found[False]), "warm": _start(found[True]), "waiting": waiting,
            "same_weights": len({run.weights_sha256 for run in found[False] + found[True]}) == 1}


def _start(runs: Sequence[Result]) -> dict[str, float]:
    """Medians of START, and the fewest boxes that had waited."""
    def median(name: str) -> float:
        # the second request ends the first step: from the job's start, what came before the first, and that step
        return statistics.median(run.first_batch_seconds + run.first_step_seconds if name == "first_step_seconds"
                                 else float(getattr(run, name)) for run in runs)
    return {**{name: median(name) for name in START}, "boxes": min(run.warm for run in runs)}


def _start_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"level {found['level']}, {what}: cold, warm", f"{found['cold'][name]:.2f}, {found['warm'][name]:.2f} s")
            for name, what in START.items()]
    if found["waiting"]:
        rows.append((f"level {found['level']}, memory of {found['waiting']['boxes']} waiting boxes",
                     f"{found['waiting']['memory_mb']:.0f} MiB"))
    return rows


def mfu_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--short", type=count, default=20, help="steps of the short run")
    parser.add_argument("--long", type=count, default=220, help="steps of the long run")
    parser.add_argument("--tries", type=count, default=1, help="pairs of a short and a long run")
    parser.add_argument("--against", type=int, choices=range(4), help="time each pair at this level too, in turn")
    parser.add_argument("--peak", type=float, default=PEAK_TFLOPS, help="TFLOP/s of the GPU, dense bf16")


def mfu(options: argparse.Namespace, say: Say) -> Finding:
    """Model FLOPs utilisation of the target's start on one GPU, trained in the box. Raises UserError without a GPU."""
    if not gpus():
        raise UserError("bench mfu needs an NVIDIA GPU, and nvidia-smi shows none.", "Run it on a GPU machine.")
    with open_ground(options, "mfu", say, slots=1) as ground:
        if find_devices(ground.site.config, 1) == ("cpu",):
            raise UserError("bench mfu needs a GPU preset; cpu trains on the processor.", "Try --preset h100.")
        facts = utilisation(ground, options.short, options.long, options.tries, options.peak, options.against)
    return Finding(f"training on one GPU, steps {options.short + 1} to {options.long}", facts, ("what", "value"), [
        ("step", f"{facts['step_ms']:.1f} ms"), ("tokens a second", f"{facts['tokens_per_second']:,.0f}"),
        ("matrix parameters N", f"{facts['matrix_parameters']:,}"),
        ("layers L, width C, context T", f"{facts['layers']}, {facts['width']}, {facts['sequence']}"),
        ("model FLOPs a token, 6 N + 12 L C T", f"{facts['flops_per_token']:.3e}"),
        ("MFU", f"{facts['mfu']:.1%} of {options.peak:g} TFLOP/s"),
        ("GPU memory, highest of a sample every 2 s", f"{facts['gpu_memory_mb']:,.0f} MiB")],
        [f"preset {facts['preset']}, level {facts['level']} on {facts['device']}",
         *([f"level {facts['against']['level']}: {facts['against']['step_ms']:.2f} ms a step, so level "
            f"{facts['level']} costs {facts['against']['ratio'] - 1:+.2%}"] if facts["against"] else [])])


def utilisation(ground: Ground, short: int, long: int, tries: int, peak_tflops: float,
                against: int | None = None) -> dict[str, Any]:
    """Step time and MFU from runs of ``short`` and ``long`` steps: in the difference of what they took after their
    first step whatever happens once (warming up, handing over the weights) cancels; compiling comes before.

    ``against``: an isolation level at which the same pairs are run too, in turn. Raises UserError.
    """
    _served(ground, "mfu")
    if not 0 < short < long:
        raise UserError(f"--short {short} --long {long}: the long run must have more steps.", "Try 20 and 220.")
    data, seed = ground.site.data, ground.site.config.seeds.first
    levels = [None] if against is None else [None, against]
    wanted = [Wanted(ground.start, seed, steps, f"start, {steps} steps", scored=False, keep_weights=True, level=level)
              for _ in range(tries) for level in levels for steps in (short, long)]
    found = ground.trained(wanted)
    assert data is not None  # a served target has data
    pairs = list(zip(found[::2], found[1::2], strict=True))
    runs = [run for pair in pairs[::len(levels)] for run in pair]
    taken = _step_seconds(pairs[::len(levels)], long - short)
    step, last = statistics.median(taken), runs[-1]
    if step <= 0:
        raise UserError(f"{long} steps took no longer than {short}: the difference drowns in noise.", "Raise --long.")
    matrices, layers, width = model_size(_shapes(ground.folder(last) / "weights.safetensors"))
    per_token = flops_per_token(matrices, layers, width, data.sequence)
    rate = last.tokens / last.steps / step
    return {"preset": ground.site.config.preset, "level": last.level, **last.fingerprint, "short": short, "long": long,
            "step_ms": 1000 * step, "step_ms_each": [1000 * seconds for seconds in taken],
            "tokens_per_step": last.tokens // last.steps, "tokens_per_second": rate, "matrix_parameters": matrices,
            "parameters": last.parameters, "layers": layers, "width": width, "sequence": data.sequence,
            "flops_per_token": per_token, "peak_tflops": peak_tflops, "mfu": rate * per_token / (peak_tflops * 1e12),
            "startup_seconds": _startup(runs), "gpu_memory_mb": max(run.gpu_memory_mb for run in runs),
            "against": _against(pairs[1::2], long - short, step) if against is not None else None}


def _step_seconds(pairs: Sequence[tuple[Result, Result]], steps: int) -> list[float]:
    """Seconds a step by each pair of a short and a long run, ``steps`` apart; on a GPU the charge is wall time."""
    return [(long.charge_seconds - short.charge_seconds) / steps for short, long in pairs]


def _against(pairs: Sequence[tuple[Result, Result]], steps: int, own: float) -> dict[str, Any]:
    """Step time at the other level, and how much longer the own one takes."""
    taken = _step_seconds(pairs, steps)
    other = statistics.median(taken)
    return {"level": pairs[0][0].level, "step_ms": 1000 * other, "step_ms_each": [1000 * seconds for seconds in taken],
            "ratio": own / other}


def flops_per_token(matrices: int, layers: int, width: int, sequence: int) -> float:
    """6 N + 12 L C T: forward and backward of one token (PaLM, arXiv 2204.02311, appendix B; nanochat counts alike).

    N: weights of the matrices that a token is multiplied by, unembedding included, embeddings not. Attention counts
    the whole square of T x T, as both sources do, though a causal kernel computes half of it. Does not cover windows
    shorter than T (counted as whole) and the optimizer's own matrix products (not counted).
    """
    return 6.0 * matrices + 12.0 * layers * width * sequence


def model_size(shapes: Shapes) -> tuple[int, int, int]:
    """(N, L, C) from the names and shapes of the weights: N by ``flops_per_token``, L numbered blocks, width C.

    Knows the names of the default target: tables are called ``embedding`` or ``value_embeddings``, the last matrix
    ``unembedding`` [V, C], the layers ``blocks.N``. Raises UserError for others.
    """
    table = re.compile(r"(?<!un)embedding")
    matrices = sum(shape[0] * shape[1] for name, shape in shapes.items() if len(shape) == 2 and not table.search(name))
    layers = {found[1] for found in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if found}
    last = shapes.get("unembedding.weight", ())
    if len(last) != 2 or not layers:
        raise UserError("The weights have no unembedding.weight, or no layers called blocks.N.",
                        "bench mfu counts models that name their tensors as the default target does.")
    return matrices, len(layers), last[1]


def _shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape from the header of a safetensors file that the sandbox has checked."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _startup(runs: Sequence[Result]) -> float:
    return float(statistics.median(run.startup_seconds for run in runs))


def _served(ground: Ground, name: str) -> None:
    if not ground.site.config.train.served or ground.site.data is None:
        raise UserError(f"bench {name} needs a target that the harness serves: only there is a first request seen.",
                        "Leave out --repo to measure the default target.")


def _levels(most: int) -> list[boxes.Level]:
    """The levels up to ``most`` that hold on this machine, the plain one first."""
    return [level for level in boxes.Level if level <= most and boxes.probe(int(level)) is level]


def _boxed(ground: Ground, command: tuple[str, ...], level: boxes.Level, tries: int) -> float:
    """Median seconds of ``command`` in the box that a run of the start gets, hidden files and all."""
    site = ground.site
    spec = BoxSpec(command, site.source(site.start), site.folder, boxes.job_uid(0), site.devices[0],
                   site.config.train.threads, environment=dict(site.config.train.environment),
                   hidden=site.data.hidden if site.data else ())
    return float(statistics.median(_life(spec, level, site.folder) for _ in range(tries)))


def _life(spec: BoxSpec, level: boxes.Level, folder: Path) -> float:
    """Seconds from before the box's files are written to after its end. Raises UserError when the command fails.

    Not through sandbox.running: its watch looks every 50 ms, and at level 0 takes any other child of this process
    for the box's own.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="box-") as place:
        Path(place).chmod(0o755)  # another user id must come through to its own part
        began = time.monotonic()
        launch = boxes.command(dataclasses.replace(spec, folder=Path(place)), level)
        with boxes.opened(launch) as (argv, fds):
            ended = subprocess.run(argv, env=launch.env, cwd=launch.cwd, pass_fds=fds, stdin=subprocess.DEVNULL,
                                   capture_output=True, text=True, start_new_session=True)
        taken = time.monotonic() - began
    if ended.returncode:
        tail = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise UserError(f"{' '.join(spec.command)} failed in a box of level {int(level)}: {tail}.",
                        "`ratchet doctor` says what this machine lacks.")
    return taken
