"""The log of a night in its run's folder, ``night.log``: what the plain screen says, with the date, also where a live
screen shows it only for a moment. Four files of a megabyte at most; none of it is needed for anything else.
"""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

from agent.ledger import Attempt, State
from agent.show import view
from agent.show.screen import Jobs, Observer, closing_lines, verdict_line

FILE = "night.log"
BYTES, OLDER = 1 << 20, 3


class Logged:
    """An Observer that passes everything on and writes it down. A full disk costs lines, never the night."""

    def __init__(self, observer: Observer, folder: Path) -> None:
        self._observer = observer
        self._handler = logging.handlers.RotatingFileHandler(folder / FILE, maxBytes=BYTES, backupCount=OLDER,
                                                             encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        self._handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._phase = ""

    def phase(self, text: str) -> None:
        if text != self._phase:
            self._phase = text
            self._write(text)
        self._observer.phase(text)

    def note(self, text: str) -> None:
        self._write(text)
        self._observer.note(text)

    def attempt(self, state: State, attempt: Attempt) -> None:
        self._write(verdict_line(view.row(attempt)))
        self._observer.attempt(state, attempt)

    def jobs(self, running: Jobs) -> None:
        self._observer.jobs(running)

    def finished(self, state: State) -> None:
        for line in closing_lines(state):
            self._write(line)
        self._observer.finished(state)

    def failed(self, error: BaseException) -> None:
        """What ended the night before its time."""
        self._write(f"ended: {type(error).__name__} {error}".rstrip(), logging.ERROR)

    def close(self) -> None:
        self._handler.close()

    def _write(self, text: str, level: int = logging.INFO) -> None:
        for line in view.block(text).splitlines():
            if line.strip():
                self._handler.handle(logging.LogRecord("ratchet", level, "", 0, line, None, None))
