"""Hooks: what the owner is told elsewhere while the night runs: merges, trouble, what waits for approval, the end.

A hook is a command of the owner's that gets one JSON object on standard input, or a URL that the same object is posted
to. Both run in a thread of their own under a deadline; nobody waits for them but the end of the night, and that not
longer than one deadline. What fails is one note, and the next only once something went through again.

What is told follows from the ledger: what is in it when the process begins is known already, so after a kill nothing
is told twice, and what happened in the very last moment before the kill may not be told at all.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Protocol

from agent import config
from agent.ledger import State
from agent.show import view
from agent.show.screen import Observer

WAITING = 200
"""News that may wait for a slow hook; more are dropped, and the note says so."""


class Night(Protocol):
    """What hooks need of a campaign."""

    observer: Observer

    @property
    def state(self) -> State: ...


class Hooks:
    """The hooks of one campaign. Called from its thread; ``_work`` alone runs in another."""

    def __init__(self, table: config.Hooks, night: Night) -> None:
        self._table, self._night, self._url = table, night, config.hook_url(table)
        self.wanted = bool(table.run or self._url)
        state = night.state
        self._merges, self._reverts, self._notes, self._broke = (
            len(state.merges), len(state.reverts), len(state.notes), len(state.broke))
        self._asked = dict(state.waiting)
        self._news: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failing = False

    def look(self) -> None:
        """Tell what is new in the ledger, and note what could not be told."""
        if not self.wanted:
            return
        state = self._night.state
        for merged in state.merges[self._merges:]:
            verdict = state.attempts[merged.candidate].verdict
            effect = verdict.estimate.effect if verdict and verdict.estimate else None
            shown = f" ({effect:+.4f} {view.metric(state)})" if effect is not None else ""
            self._tell("merge", f"merged: {merged.subject}{shown}", candidate=merged.candidate,
                       commit=merged.new_tip, effect=effect)
        for back in state.reverts[self._reverts:]:
            self._tell("merge", f"taken back: {back.subject}", candidate=back.candidate, commit=back.new_tip)
        for text in state.notes[self._notes:]:
            self._tell("trouble", text)
        for name in state.broke[self._broke:]:
            self._tell("trouble", f"the machine failed run {name}: {state.results[name].message}"
                       if name in state.results else f"the machine failed run {name}")
        for name, tree in state.waiting.items():
            if self._asked.get(name) != tree:
                self._tell("approval", f"{name} waits for approval: ratchet approve {state.attempts[name].number}",
                           candidate=name)
        self._merges, self._reverts, self._notes, self._broke, self._asked = (
            len(state.merges), len(state.reverts), len(state.notes), len(state.broke), dict(state.waiting))
        self._say_failures()

    def end(self, error: BaseException | None) -> None:
        """Tell how the night ended, and wait for what is on its way, for one deadline at most."""
        if not self.wanted:
            return
        self.look()
        state = self._night.state
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._tell("trouble", f"the night ended: {error}")
        told = f"{len(state.merges)} of {len(state.attempts)} attempts merged; gain {view.gain_line(state)}"
        self._tell("end", ("finished: " if state.phase == "finished" else "stopped: ") + told)
        if self._thread is not None:
            end = time.monotonic() + self._table.seconds
            while self._news.unfinished_tasks and time.monotonic() < end:
                time.sleep(0.02)
        self._say_failures()

    def _tell(self, event: str, text: str, **more: Any) -> None:
        if event not in self._table.on:
            return
        state = self._night.state
        news = {"event": event, "run": str(state.campaign.get("name", "")), "text": view.clean(text),
                "time": state.last_time, **more, "status": view.status(state, True)}
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="hooks", daemon=True)
            self._thread.start()
        try:
            self._news.put_nowait(news)
        except queue.Full:
            self._failures.put(f"{WAITING} are waiting already")

    def _say_failures(self) -> None:
        while True:
            try:
                text = self._failures.get_nowait()
            except queue.Empty:
                return
            if text and not self._failing:  # on the screen and in the log: in the ledger it would be news again
                self._night.observer.note(f"a hook failed: {text}; the night goes on")
            self._failing = bool(text)

    def _work(self) -> None:
        while True:
            news = self._news.get()
            body = json.dumps(news).encode()
            failed = [problem for problem in (self._run(body) if self._table.run else "",
                                              self._post(body) if self._url else "") if problem]
            self._failures.put("; ".join(failed))
            self._news.task_done()

    def _run(self, body: bytes) -> str:
        """Run the command; what went wrong, or an empty string."""
        try:
            process = subprocess.Popen(shlex.split(self._table.run), stdin=subprocess.PIPE,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        except (OSError, ValueError) as error:
            return f"{self._table.run}: {error}"
        try:
            process.communicate(body + b"\n", timeout=self._table.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"{self._table.run}: not done within {self._table.seconds:g} s"
        except OSError as error:
            return f"{self._table.run}: {error}"
        return f"{self._table.run}: exit code {process.returncode}" if process.returncode else ""

    def _post(self, body: bytes) -> str:
        """Post to the URL; what went wrong (never the URL, which may be a secret), or an empty string."""
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(self._posted(body)), name="webhook", daemon=True)
        thread.start()
        thread.join(self._table.seconds)
        return found[0] if found else f"the webhook did not answer within {self._table.seconds:g} s"

    def _posted(self, body: bytes) -> str:
        try:
            request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=self._table.seconds):
                return ""
        except urllib.error.HTTPError as error:
            return f"the webhook answered {error.code}"
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            return f"the webhook was not reached ({reason})"
