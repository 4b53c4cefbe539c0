"""NVML as the driver's Python binding shows it, with GPUs whose state a test sets. For machines without a GPU.

As a module it can stand in for ``pynvml`` in other processes: ``install`` writes it, and a ``nvidia-smi``, into a
folder; its state is then a JSON file that both read anew at each call.
"""

from __future__ import annotations

import contextlib
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import gpu

NVML_CLOCK_SM = 1
nvmlEventTypeXidCriticalError = 8


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class FakeNvml:
    """The functions that are asked, over ``cards``: UUID -> what the GPU tells. ``error``: a code that every call on
    this GPU raises; ``lost``: nvidia-smi has no answer; ``unsupported``: names of functions that it does not
    support."""

    NVML_CLOCK_SM, nvmlEventTypeXidCriticalError, NVMLError = NVML_CLOCK_SM, nvmlEventTypeXidCriticalError, NVMLError

    def __init__(self, file: Path | None = None, **cards: dict[str, Any]) -> None:
        self._file, self._cards = file, cards
        self._heard: set[tuple[str, int]] = set()

    @property
    def cards(self) -> dict[str, dict[str, Any]]:
        return json.loads(self._file.read_text(encoding="utf-8")) if self._file is not None else self._cards

    def _card(self, handle: str, name: str) -> dict[str, Any]:
        card = self.cards[handle]
        if card.get("error"):
            raise NVMLError(card["error"])
        if name in card.get("unsupported", ()):
            raise NVMLError(3)
        return card

    def nvmlInit(self) -> None:
        if not self.cards:
            raise NVMLError(9)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.cards:
            raise NVMLError(6)
        self._card(uuid, "handle")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self._card(handle, "memory").get("memory_mb", 100) * 2**20)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self._card(handle, "busy").get("busy", 90))

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        assert kind == NVML_CLOCK_SM
        return int(self._card(handle, "clock").get("clock", 1980))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return int(self._card(handle, "reasons").get("reasons", 4))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self._card(handle, "processes").get("pids", ())]

    def nvmlEventSetCreate(self) -> list[str]:
        return []

    def nvmlDeviceRegisterEvents(self, handle: str, kinds: int, events: list[str]) -> None:
        assert kinds == nvmlEventTypeXidCriticalError
        self._card(handle, "events")
        events.append(handle)

    def nvmlEventSetWait_v2(self, events: list[str], milliseconds: int) -> Any:
        assert milliseconds == 0
        for handle in events:
            for number, xid in enumerate(self.cards[handle].get("xids", ())):
                if (handle, number) not in self._heard:
                    self._heard.add((handle, number))
                    return SimpleNamespace(eventData=xid)
        raise NVMLError(10)

    def nvmlEventSetFree(self, events: list[str]) -> None:
        events.clear()


def install(folder: Path, **cards: dict[str, Any]) -> Path:
    """Write ``pynvml.py`` and ``nvidia-smi`` for GPUs 0, 1, ... into ``folder``. Returns the state's file.

    Put the folder first on PATH and on sys.path (PYTHONPATH) of the process that is to see the GPUs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "gpus.json"
    change(state, **cards)
    own = Path(__file__).read_text(encoding="utf-8").partition("\n\n@contextlib")[0].replace(
        "import pytest\n\nfrom sandbox import gpu\n", "")
    (folder / "pynvml.py").write_text(
        own + f"\n\n_fake = FakeNvml(Path({str(state)!r}))\n"
        "globals().update({name: getattr(_fake, name) for name in dir(_fake) if name.startswith('nvml')})\n",
        encoding="utf-8")
    smi = folder / "nvidia-smi"
    smi.write_text(f"""#!/usr/bin/env python3
import json, sys
cards = list(json.load(open({str(state)!r})).items())
number = int(sys.argv[sys.argv.index("-i") + 1])
if number >= len(cards) or cards[number][1].get("lost"):
    sys.exit(6)
print(f"Driver Version : 550.1\\n    Product Name : {{cards[number][1].get('name', 'NVIDIA Fake')}}")
print(f"    GPU UUID : {{cards[number][0]}}\\n    Minor Number : {{number}}")
""", encoding="utf-8")
    smi.chmod(smi.stat().st_mode | stat.S_IEXEC)
    return state


def change(state: Path, **cards: dict[str, Any]) -> None:
    """Set the GPUs' state, whole."""
    new = state.with_suffix(".new")
    new.write_text(json.dumps(cards), encoding="utf-8")
    new.replace(state)


@contextlib.contextmanager
def seen(folder: Path, monkeypatch: pytest.MonkeyPatch, **cards: dict[str, Any]) -> Iterator[Path]:
    """This process and its children see these GPUs, as far as nvidia-smi and NVML tell. Gives the state's file."""
    state = install(folder, **cards)
    monkeypatch.setenv("PATH", f"{folder}:/usr/local/bin:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.syspath_prepend(str(folder))
    gpu.find.cache_clear()
    try:
        yield state
    finally:
        gpu.find.cache_clear()
        sys.modules.pop("pynvml", None)
