"""What the campaign tells a person while it works: one live screen, or plain lines where there is no terminal.

The campaign only knows the Observer. It is called from one thread; nothing here decides anything.
"""

from __future__ import annotations

import datetime
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agent.ledger import Attempt, Clock, State, utc_now
from agent.show import view
from sandbox.job import Progress

Jobs = list[tuple[str, Progress | None]]

STYLE: dict[view.Kind, str] = {
    "accepted": "bold green", "bundled": "green", "refused": "bright_black", "untrained": "yellow", "failed": "red",
    "open": "default"}
SHOWN = 8
"""Verdicts that the live screen keeps in sight."""
QUIET_SECONDS = 60.0
"""Plain mode says how the running jobs do at most this often."""


class Observer(Protocol):
    """What a campaign reports, in the order of the night."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """A line that the user should read."""

    def attempt(self, state: State, attempt: Attempt) -> None:
        """A verdict was reached."""

    def jobs(self, running: Jobs) -> None:
        """Label and progress of each running job, about twice a second."""

    def finished(self, state: State) -> None:
        """The campaign ended."""


class Screen(Observer, Protocol):
    """An Observer that is opened and closed, and remembers the newest State it saw."""

    state: State | None

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...


def open_screen(console: Console, clock: Clock = utc_now) -> Screen:
    """The live screen on a terminal, plain lines elsewhere."""
    return LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen(console, clock)


class PlainScreen:
    """One time-stamped line a change of phase, note and verdict."""

    def __init__(self, console: Console, clock: Clock = utc_now) -> None:
        self.state: State | None = None
        self._console, self._clock = console, clock
        self._phase = ""
        self._told: datetime.datetime | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        return None

    def phase(self, text: str) -> None:
        if text != self._phase:
            self._phase = text
            self._say(view.clean(text))

    def note(self, text: str) -> None:
        for line in view.block(text).splitlines():
            self._say(line)

    def attempt(self, state: State, attempt: Attempt) -> None:
        self.state = state
        self._say(verdict_line(view.row(attempt)))

    def jobs(self, running: Jobs) -> None:
        """Every minute at most, so that a night's log stays a few hundred lines."""
        now = self._clock()
        self._told = self._told or now
        if not running or (now - self._told).total_seconds() < QUIET_SECONDS:
            return
        self._told = now
        self._say("running: " + "; ".join(f"{view.clean(label)} {_glance(progress)}" for label, progress in running))

    def finished(self, state: State) -> None:
        self.state = state
        for line in closing_lines(state):
            self._print(line)

    def _say(self, text: str) -> None:
        self._told = self._clock()
        self._print(f"{self._told.astimezone():%H:%M:%S}  {text}")

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class LiveScreen:
    """Phase, running jobs with bars, the last verdicts, the best so far and the cost, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self.state: State | None = None
        self._console = console
        self._phase = ""
        self._jobs: Jobs = []
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._draw, redirect_stderr=True,
                          redirect_stdout=True, vertical_overflow="crop")

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._jobs = []
        self._live.stop()

    def phase(self, text: str) -> None:
        self._phase = view.clean(text)
        self._live.refresh()

    def note(self, text: str) -> None:
        """Above the live area, where it stays readable."""
        self._console.print(Text(view.block(text), style="cyan"))

    def attempt(self, state: State, attempt: Attempt) -> None:
        self.state = state
        self._live.refresh()

    def jobs(self, running: Jobs) -> None:
        self._jobs = running
        self._live.refresh()

    def finished(self, state: State) -> None:
        self.state, self._phase, self._jobs = state, "finished", []
        self._live.refresh()
        self._live.stop()
        for line in closing_lines(state):
            self._console.print(Text(line), soft_wrap=True)

    def _draw(self) -> RenderableType:
        parts: list[RenderableType] = [Text(self._phase or "starting", style="bold")]
        if self._jobs:
            parts.append(_bars(self._jobs))
        if self.state is not None:
            rows = [row for row in view.rows(self.state) if row.outcome]
            parts += [Text(), _verdicts(rows[-SHOWN:]), Text(), _tally(self.state, rows)]
        return Group(*parts)


def verdict_line(row: view.Row) -> str:
    """``accepted  003 qk-scale  -0.0243 [..] ... reason``."""
    effect = f"  {row.effect}" if row.estimate else ""
    fault = f" [{row.fault}]" if row.fault else ""
    return f"{row.outcome or 'in work'}  #{row.number} {row.title}{effect}{fault}  {row.stage}: {row.reason}"


def closing_lines(state: State) -> list[str]:
    """The merged history and the final number, as the last thing on the screen."""
    rows = view.rows(state)
    merged = [row for row in rows if row.kind == "accepted"]
    lines = ["", f"{len(merged)} of {len(rows)} attempts merged:" if merged else
             f"None of {len(rows)} attempts was merged."]
    lines += [f"  {row.commit[:9]}  {row.effect:<28}  {row.title}" for row in merged]
    return [*lines, f"gain   {view.gain_line(state)}", f"spent  {view.spent_line(state)}"]


def _bars(jobs: Jobs) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, max_width=40, overflow="ellipsis")
    table.add_column(width=24)
    table.add_column(no_wrap=True)
    for label, progress in jobs:
        steps = float(progress.steps) if progress and progress.steps else None
        known = progress is not None and progress.phase == "train" and steps is not None
        bar = ProgressBar(total=steps if known else None, completed=progress.step if progress and known else 0,
                          pulse=not known, width=24)
        table.add_row(Text(view.clean(label)), bar, Text(_glance(progress), style="bright_black"))
    return table


def _glance(progress: Progress | None) -> str:
    """``120/300, loss 2.310, 8 s left``."""
    if progress is None:
        return "starting"
    if progress.phase != "train":
        return f"{progress.phase}, {view.duration(progress.seconds)}"
    steps = f"{progress.step}/{progress.steps}" if progress.steps else f"step {progress.step}"
    loss = f", loss {progress.loss:.3f}" if progress.loss is not None else ""
    left = f", {view.duration(progress.eta_seconds)} left" if progress.eta_seconds is not None else ""
    return f"{steps}{loss}{left or f', {view.duration(progress.seconds)}'}"


def _verdicts(rows: list[view.Row]) -> Table:
    table = Table.grid(padding=(0, 2))
    for width, share in ((4, None), (12, None), (28, None), (None, 2), (None, 3)):
        table.add_column(no_wrap=True, width=width, ratio=share, overflow="ellipsis")
    table.expand = True
    for row in rows:
        style = STYLE[row.kind]
        fault = f"[{row.fault}] " if row.fault else ""
        table.add_row(Text(f"#{row.number}", style), Text(row.outcome or "", style), Text(row.effect, style),
                      Text(row.title, style), Text(f"{row.stage}: {fault}{row.reason}", "bright_black"))
    return table


def _tally(state: State, rows: list[view.Row]) -> Text:
    """Best so far and what it cost. The sum of the merged effects is named as such: it is not the final gain."""
    merged = [row for row in rows if row.kind == "accepted" and row.estimate]
    text = Text(f"{len(merged)} merged, {len(rows) - len(merged)} refused")
    if merged:
        total = view.merged_sum(state)
        text.append(f"   best so far: {view.metric(state)} {total:+.4f} (sum of merged effects, {view.better(state)})",
                    "green")
    return text.append(f"   {view.spent_line(state)}", "bright_black")
