"""Protected: the seam between the training loop and whoever owns the run.

``connect()`` gives a Harness with ``seed``, ``steps``, ``preset``, ``device`` and three verbs: ``batch()``,
``report(step, loss)``, ``finish(model)``. With HARNESS_FD in the environment the other end of that socket serves the
batches, counts and times them, and takes the weights (the frames are described in README.md). Without it the run is by
hand: batches come from data/PRESET/train.bin, the weights go to out/PRESET.safetensors and val_bpb is printed.
"""

import argparse
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors.torch
import torch

from presets import PRESETS

HEADER = struct.Struct("<cQ")
REPORT_EVERY = 10

Batch = tuple[torch.Tensor, torch.Tensor]


class Harness(Protocol):
    seed: int
    steps: int
    preset: str
    device: str

    def batch(self, rows: int | None = None) -> Batch | None:
        """Token ids and targets, int64 [rows, T]; None when the budget is spent. One call is one charged step."""

    def report(self, step: int, loss: torch.Tensor) -> None:
        """Say how it goes. For the eye only: nothing is decided on it."""

    def finish(self, model: torch.nn.Module) -> None:
        """Hand over the weights. Nothing after this counts."""


def connect() -> Harness:
    """The harness on HARNESS_FD, else a run by hand from the command line."""
    fd = os.environ.get("HARNESS_FD")
    return Served(int(fd)) if fd else ByHand()


def tensors(raw: bytes | np.ndarray, rows: int, sequence: int, device: str) -> Batch:
    """uint16 rows of sequence + 1 ids to (ids, targets)."""
    ids = torch.from_numpy(np.frombuffer(raw, np.uint16).reshape(rows, sequence + 1).astype(np.int64))
    if device.startswith("cuda"):
        ids = ids.pin_memory().to(device, non_blocking=True)
    return ids[:, :-1], ids[:, 1:]


class Wire:
    """Frames over the inherited socket: one byte of kind, a little-endian uint64 of length, the payload."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.socket.setblocking(True)

    def send(self, kind: bytes, payload: bytes | memoryview = b"") -> None:
        self.socket.sendall(HEADER.pack(kind, len(payload)))
        if payload:  # after an empty frame the other end may rightly be gone
            self.socket.sendall(payload)

    def receive(self) -> tuple[bytes, bytearray]:
        kind, length = HEADER.unpack(self.read(HEADER.size))
        return kind, self.read(length)

    def read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            got = self.socket.recv_into(view[done:])
            if got == 0:
                raise SystemExit("harness: the other end closed")
            done += got
        return data


class Served:
    """A run that a harness process owns."""

    def __init__(self, fd: int) -> None:
        self.wire = Wire(fd)
        spec = json.loads(self.wire.receive()[1])
        self.seed, self.steps, self.preset = int(spec["seed"]), int(spec["steps"]), str(spec["preset"])
        self.device, self.rows, self.sequence = str(spec["device"]), int(spec["rows"]), int(spec["sequence"])
        self.check = bool(spec["check"])
        prepare_device(self.device, int(spec["threads"]), self.seed)
        poison(self.check)

    def batch(self, rows: int | None = None) -> Batch | None:
        rows = rows or self.rows
        if self.check:
            # one process at a time on the device, so that the other end can time this step
            poison(False)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
        self.wire.send(b"?", struct.pack("<I", rows))
        kind, raw = self.wire.receive()
        return tensors(raw, rows, self.sequence, self.device) if kind == b"B" else None

    def report(self, step: int, loss: torch.Tensor) -> None:
        if step % REPORT_EVERY == 0 or step == self.steps or self.check:
            self.wire.send(b"P", json.dumps({"step": step, "loss": float(loss.detach())}).encode())

    def finish(self, model: torch.nn.Module) -> None:
        self.wire.send(b"W", safetensors.torch.save(plain(model)))


class ByHand:
    """A run that a person started."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        parser = argparse.ArgumentParser(description="Train by hand; prepare.py must have run.")
        parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
        parser.add_argument("--steps", type=int, default=0)
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
        parser.add_argument("--data", type=Path)
        args = parser.parse_args()
        preset = PRESETS[args.preset]
        self.folder = args.data or Path("data") / preset.name
        if not (self.folder / "meta.json").exists():
            raise SystemExit(f"No data in {self.folder}. Make it:  python prepare.py --preset {preset.name}")
        self.tokens = np.memmap(self.folder / "train.bin", np.uint16, "r")
        self.seed, self.steps = args.seed, args.steps or preset.steps
        self.preset, self.device = preset.name, args.device
        self.rows, self.sequence, self.count, self.start = preset.rows, preset.sequence, 0, 0.0
        prepare_device(self.device, 0, self.seed)
        self.order = np.random.default_rng(self.seed).permutation((len(self.tokens) - 1) // self.sequence)
        self.bar = Progress(TextColumn("step {task.completed}/{task.total}"), BarColumn(),
                            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
                            TimeRemainingColumn())
        self.task = self.bar.add_task("train", total=self.steps, loss=float("nan"), rate=0.0)

    def batch(self, rows: int | None = None) -> Batch | None:
        if self.count >= self.steps:
            return None
        if self.count == 0:
            self.start = time.monotonic()
            self.bar.start()
        rows = rows or self.rows
        picks = self.order[(self.count * rows + np.arange(rows)) % len(self.order)]
        self.count += 1
        raw = np.stack([self.tokens[i * self.sequence: (i + 1) * self.sequence + 1] for i in picks])
        return tensors(raw, rows, self.sequence, self.device)

    def report(self, step: int, loss: torch.Tensor) -> None:
        if step % REPORT_EVERY == 0 or step == self.steps:
            rate = step * self.rows * self.sequence / (time.monotonic() - self.start)
            self.bar.update(self.task, completed=step, loss=float(loss.detach()), rate=rate)
            if not self.bar.console.is_terminal:
                print(f"step {step}/{self.steps}  loss {float(loss.detach()):.3f}  {rate:,.0f} tokens/s", flush=True)

    def finish(self, model: torch.nn.Module) -> None:
        from evaluate import bits_per_byte

        self.bar.stop()
        out = Path("out") / f"{self.preset}.safetensors"
        out.parent.mkdir(exist_ok=True)
        safetensors.torch.save_file(plain(model), out)
        print(f"{self.steps} steps in {time.monotonic() - self.start:.1f} s; weights in {out}")
        value = bits_per_byte(plain(model), self.preset, self.device, self.folder, "val")
        print(f"val_bpb {value:.4f}")


def plain(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model or of its compiled wrapper, on the CPU, under its plain names."""
    return {name.removeprefix("_orig_mod."): tensor.detach().to("cpu").contiguous().clone()
            for name, tensor in model.state_dict().items()}


def prepare_device(device: str, threads: int, seed: int) -> None:
    """Settings of torch that are the harness's, not the patch's."""
    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")


def poison(on: bool) -> None:
    """While on, uninitialised memory is filled with NaN, so that a parameter nobody set is seen at once."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = on
