"""Commands that tell a running campaign something from another terminal, and `ratchet service`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agent import runs
from agent.errors import UserError
from agent.ledger import State, replay
from agent.records import OrderKind
from agent.show import view

RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the newest one if left out.",
                                             show_default=False)]
NameOption = Annotated[str, typer.Option("--name", help="Name of the run.", show_default=False)]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id or number of an attempt.")]
WhyOption = Annotated[str, typer.Option("--why", metavar="TEXT", help="For the ledger.", show_default=False)]
RUNS = Path("runs")


def add(app: typer.Typer) -> None:
    """Put the commands on the command line."""
    for name, command in (("pause", pause), ("resume", resume), ("stop", stop), ("steer", steer), ("veto", veto),
                          ("revert", revert), ("approve", approve), ("service", service_command)):
        app.command(name)(command)


def pause(name: NameArgument = "", folder: RunsOption = RUNS) -> None:
    """Start no further job until `ratchet resume`; running ones end by themselves."""
    _order(folder, name, "pause", said="no further job is started until `ratchet resume`")


def resume(name: NameArgument = "", folder: RunsOption = RUNS) -> None:
    """Go on after `ratchet pause`. (A stopped run goes on with the command that started it.)"""
    _order(folder, name, "resume", said="it goes on")


def stop(
    name: NameArgument = "",
    after_current: Annotated[bool, typer.Option("--after-current", help="Let the running jobs end first.")] = False,
    folder: RunsOption = RUNS,
) -> None:
    """Stop a running campaign, as Ctrl-C in its own terminal does; the command that started it goes on."""
    place, _ = _load(folder, name)
    if not runs.held(place):
        raise UserError(f"Run {place.name} is not running.", "`ratchet status` says where it stands.")
    _order(folder, name, "stop-after-current" if after_current else "stop",
           said="it ends when the running jobs have" if after_current else "it ends now")


def steer(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model is told, as the owner's wish.",
                                        show_default=False)] = "",
    forget: Annotated[bool, typer.Option("--forget", help="Take back all that was said before.")] = False,
    name: NameOption = "", folder: RunsOption = RUNS,
) -> None:
    """Tell the proposing model where to look, from its next briefing on."""
    if bool(text.strip()) == forget:
        raise UserError("Say what the model is told, or --forget what it was told.",
                        'For instance:  ratchet steer "focus on the optimizer"')
    if forget:
        _order(folder, name, "forget", said="what was said before is in no further briefing")
    else:
        _order(folder, name, "steer", text, said="it is in every briefing from now on")


def veto(wanted: IdArgument, why: WhyOption = "", name: NameOption = "", folder: RunsOption = RUNS) -> None:
    """End an attempt that is in work, or that waits for approval, as rejected."""
    _order(folder, name, "veto", why, wanted, said="it ends as rejected")


def revert(wanted: IdArgument, why: WhyOption = "", name: NameOption = "", folder: RunsOption = RUNS) -> None:
    """Take a merge back by a commit on the accepted branch; what is in work starts over on that tip."""
    _order(folder, name, "revert", why, wanted, said="it is taken back")


def approve(wanted: IdArgument, name: NameOption = "", folder: RunsOption = RUNS) -> None:
    """Merge a candidate that waits for a person (judge.approve = true)."""
    _order(folder, name, "approve", "", wanted, said="it is merged")


def service_command(
    repo: Annotated[Path | None, typer.Argument(help="Target.", show_default=False)] = None,
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Each night ends then.")] = "07:00",
    at: Annotated[str, typer.Option("--at", metavar="TIME", help="Each night begins then.")] = "22:00",
    folder: RunsOption = RUNS,
) -> None:
    """Print a systemd user unit and its timer for a campaign every night. Writes nothing."""
    from agent import service
    for line in service.units(repo, folder, at, until):
        typer.echo(line)


def _load(folder: Path, name: str) -> tuple[Path, State]:
    place = runs.resolve(folder, name)
    return place, replay(place / runs.LEDGER)[0]


def _order(folder: Path, name: str, kind: OrderKind, text: str = "", wanted: str = "", said: str = "") -> None:
    """Give the order, unless it is seen already that it cannot be followed."""
    from agent import steering
    place, state = _load(folder, name)
    attempt = view.find(state, wanted) if wanted else None
    problem = steering.check(state, kind, attempt)
    if problem:
        raise UserError(f"Run {place.name}: {view.clean(problem)}.", "`ratchet log` lists the attempts, `ratchet "
                        "status` says where the run stands.")
    number = steering.give(place, kind, text, attempt.proposal.id if attempt else "")
    about = f" {view.clean(attempt.proposal.id)}" if attempt else ""
    when = "" if runs.held(place) else "; the run does not run now: this holds once it goes on"
    typer.echo(f"order {number} to run {place.name}: {kind}{about}: {said}{when}")
