"""Slots: where a light job goes while the devices train."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import measure
from agent.measure import Load, Slots
from agent.site import Site
from sandbox.engine import LocalEngine


def site_of(folder: Path, *devices: str) -> Site:
    return cast(Site, SimpleNamespace(devices=devices, folder=folder,
                                      config=SimpleNamespace(train=SimpleNamespace(threads=1))))


def test_idle_cores_are_those_that_nobody_uses() -> None:
    """Against processes that do nothing but use a core each."""
    load = Load()
    assert load.idle() == 0.0  # nothing is known yet
    cores = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.5)
        load = Load()
        time.sleep(1.5)
        used = load.idle()
    finally:
        for one in busy:
            one.kill()
            one.wait()
    assert 0 <= used < 0.5
    deadline = time.monotonic() + 60
    while load.idle() < used + 0.5:  # others may be at work here, but not all of the time
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert load.idle() <= cores + 0.1


@pytest.mark.parametrize(("idle", "device"), [(0.9, None), (1.9, "cpu")])
def test_a_light_job_goes_beside_full_slots_only_while_a_core_is_idle(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, idle: float, device: str | None) -> None:
    monkeypatch.setattr(measure, "_cores", lambda: [0, 1])
    monkeypatch.setattr(Load, "idle", lambda _: idle)
    slots = Slots(site_of(tmp_path, "cpu", "cpu"), LocalEngine(), 0)
    training: Any = SimpleNamespace(device="cpu", purpose="pair")
    for slot in slots._slots[:2]:
        slot.run = training
    assert slots.idle == 0 and slots.free() is None and slots.free(light=True) == device
    if device:  # what was offered holds, however busy the machine is a moment later
        monkeypatch.setattr(Load, "idle", lambda _: 0.0)
        begun: list[Path] = []
        monkeypatch.setattr(LocalEngine, "start", lambda _, folder, job: begun.append(folder))
        probe: Any = SimpleNamespace(device=device, purpose="preflight", folder="jobs/probe")
        slots.start(probe, cast(Any, None))
        assert begun == [tmp_path / "jobs/probe"] and slots.busy[-1] is probe and slots.free(light=True) is None
    full = Slots(site_of(tmp_path, "cuda:0"), LocalEngine(), 0)
    full._slots[0].run = training
    assert full.free(light=True) is None  # it would slow the run on the GPU


def test_nothing_goes_beside_a_slot_that_has_the_only_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end sooner or later as chance decides, and the order of the night with it."""
    monkeypatch.setattr(measure, "_cores", lambda: [0])
    monkeypatch.setattr(Load, "idle", lambda _: 1.003)  # the kernel's counts and our clock are not read at one moment
    slots = Slots(site_of(tmp_path, "cpu"), LocalEngine(), 0)
    assert slots.free(light=True) == "cpu"
    training: Any = SimpleNamespace(device="cpu", purpose="preflight")
    slots._slots[0].run = training
    assert slots.free(light=True) is None
