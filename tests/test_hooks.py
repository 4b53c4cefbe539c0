"""Hooks: real commands, a real HTTP server; what fails or hangs costs a line and never the night."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agent import config, tiny
from agent.hooks import Hooks
from agent.ledger import State
from agent.llm.scripted import Delay, Fixed
from agent.show.nightlog import FILE, Logged
from tests.night import Night
from tests.test_campaign import END, known, ratchet, serving


class Told:
    """An observer that keeps notes, and the night that the hooks look at."""

    def __init__(self, state: State) -> None:
        self.state, self.notes = state, list[str]()
        self.observer: Any = self

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextlib.contextmanager
def listening(code: int = 200, delay: float = 0.0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            time.sleep(delay)
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/secret", got
    finally:
        server.shutdown()
        server.server_close()


def script(folder: Path, body: str) -> str:
    path = folder / "hook.py"
    path.write_text(body)
    return f"{sys.executable} {path}"


def test_a_command_and_a_url_are_told_of_merges_trouble_and_the_end(tmp_path: Path) -> None:
    command = script(tmp_path, f"import sys\nopen({str(tmp_path / 'told')!r}, 'a').write(sys.stdin.read())\n")
    night = Night(tmp_path / "runs", "n")
    with listening() as (url, got):
        told = Told(night.state)
        hooks = Hooks(config.Hooks(run=command, url=url), told)
        night.judge("Betas \x1b[31m(0.8, 0.99)", -0.03, accept=True)
        hooks.look()
        night.ledger.append("note", {"text": "no more proposals: the key expired"})
        hooks.look()
        hooks.look()  # nothing is told twice
        night.finish()
        hooks.end(None)
    lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [one["event"] for one in lines] == ["merge", "trouble", "end"] and lines == got
    assert lines[0]["effect"] == -0.03 and lines[0]["commit"] == night.state.tip and "\x1b" not in lines[0]["text"]
    assert lines[2]["status"]["state"] == "finished" and "1 of 1 attempts merged" in lines[2]["text"]
    assert not told.notes


def test_what_was_in_the_ledger_before_is_not_told_again(tmp_path: Path) -> None:
    night = Night(tmp_path / "runs", "n")
    night.judge("Betas", -0.03, accept=True)
    with listening() as (url, got):
        hooks = Hooks(config.Hooks(url=url), Told(night.state))
        hooks.look()
        hooks.end(None)
    assert [one["event"] for one in got] == ["end"]


@pytest.mark.parametrize("kind", ["hangs", "fails", "missing", "http", "refused", "slow"])
def test_a_broken_hook_is_one_note_and_holds_nobody_up(tmp_path: Path, kind: str) -> None:
    bodies = {"hangs": "import time\ntime.sleep(60)\n", "fails": "raise SystemExit(3)\n"}
    with listening(500 if kind == "http" else 200, 30 if kind == "slow" else 0) as (url, _):
        table = (config.Hooks(run=script(tmp_path, bodies[kind]), seconds=1) if kind in bodies else
                 config.Hooks(run="/no/such/program", seconds=1) if kind == "missing" else
                 config.Hooks(url="http://127.0.0.1:9/secret" if kind == "refused" else url, seconds=1))
        night = Night(tmp_path / "runs", "n")
        told = Told(night.state)
        hooks = Hooks(table, told)
        for number in range(3):
            night.ledger.append("note", {"text": f"trouble {number}"})
            begun = time.monotonic()
            hooks.look()
            assert time.monotonic() - begun < 0.5
        end = time.monotonic() + 20
        while not told.notes and time.monotonic() < end:
            hooks.look()
            time.sleep(0.05)
        begun = time.monotonic()
        hooks.end(RuntimeError("the disk is full"))
        assert time.monotonic() - begun < 5
    assert len(told.notes) == 1 and "the night goes on" in told.notes[0] and "secret" not in told.notes[0]


def one_then_end(body: dict[str, Any]) -> Fixed:
    return known("less smoothing") if "This is attempt 1" in body["messages"][-1]["content"] else Delay(1.0, END)


def test_a_whole_campaign_tells_and_logs(tmp_path: Path) -> None:
    tiny.write_tiny_target(tmp_path / "target", served=False)
    toml = tmp_path / "target" / "ratchet.toml"
    toml.write_text(toml.read_text() + '\n[hooks]\nurl_variable = "NEWS_URL"\n')
    tiny.commit(tmp_path / "target", "Hooks")
    with listening() as (url, got), serving(one_then_end) as (_, variables):  # type: ignore[arg-type]
        done = ratchet("run", "target", "--name", "n", model={**variables, "NEWS_URL": url}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [one["event"] for one in got if one["event"] != "trouble"] == ["merge", "end"]
    log = (tmp_path / "runs" / "n" / FILE).read_text()
    assert "accepted  #1 less smoothing" in log and "forecast: about" in log and "costs $1000" in log
    assert url not in log and "sk-tiny" not in log


def test_the_log_turns_over_and_a_full_disk_costs_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.show.nightlog.BYTES", 2000)
    told: Any = Told(State())
    log = Logged(told, tmp_path)
    for number in range(300):
        log.note(f"line {number} \x1b[2J of a long night")
    log.close()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [FILE, f"{FILE}.1", f"{FILE}.2", f"{FILE}.3"]
    assert all((tmp_path / name).stat().st_size <= 2000 for name in files)
    assert "line 299" in (tmp_path / FILE).read_text() and "\x1b" not in (tmp_path / FILE).read_text()
    full: Any = Logged(told, Path("/dev/full/nothing"))
    full.note("still told")
    assert told.notes[-1] == "still told"
