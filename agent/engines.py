"""Which engine runs the jobs: the one of this machine, a Ray cluster, or Slurm. Opened before a campaign, closed after.

Chosen by ``--engine``, else as the campaign was begun, else by ``[engine]`` of ratchet.toml. The modules of other
engines are imported only when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from agent.config import Config, Engine, EngineKind
from agent.errors import UserError
from sandbox.engine import Cluster, EngineError, LocalEngine
from sandbox.engine import Engine as Runner


def chosen(asked: str, begun: str, table: Engine) -> EngineKind:
    """The kind of engine. Raises UserError for one that is not there, or another than the campaign was begun on."""
    kinds = get_args(EngineKind)
    if asked and asked not in kinds:
        raise UserError(f"There is no engine {asked!r}.", f"Choose one of: {', '.join(kinds)}.")
    if asked and begun and asked != begun:
        raise UserError(f"This run was begun on the engine {begun}, not {asked}.",
                        "Leave out --engine, or start a new run:  ratchet run --name NEW")
    return cast(EngineKind, asked or begun or table.kind)


def cluster(kind: EngineKind, table: Engine, folder: Path) -> Cluster | None:
    """The engine for other machines; None for this one. ``folder``: the campaign's. Raises UserError."""
    try:
        if kind == "ray":
            from sandbox.engine_ray import RayEngine
            return RayEngine(folder, table.address, table.scratch)
        if kind == "slurm":
            from sandbox.engine_slurm import Request, SlurmEngine
            return SlurmEngine(Request(table.partition, table.account, table.time, table.gres, tuple(table.extra)),
                               table.python)
    except EngineError as error:
        raise UserError(error.problem, error.mend) from error
    return None


def reserve(engine: Cluster, config: Config, slots: int | None, highest: int) -> tuple[str, ...]:
    """The device of each slot. GPUs where there are any and the preset is not ``cpu``. Raises UserError."""
    for key in ("gpus_per_run", "jobs_per_gpu"):
        if getattr(config.train, key) > 1:
            raise UserError(f"train.{key} works on this machine's own GPUs alone (--engine local).",
                            f"Set train.{key} = 1 for this engine.")
    try:
        return engine.reserve(engine.gpus > 0 and config.preset != "cpu", config.train.threads,
                              slots or config.engine.slots or None, highest)
    except EngineError as error:
        raise UserError(error.problem, error.mend) from error


@dataclass(frozen=True, slots=True)
class Opening:
    """An engine while a campaign is being opened: ``remote`` is None on this machine."""

    kind: EngineKind
    remote: Cluster | None

    @property
    def runner(self) -> Runner:
        return self.remote or LocalEngine()
