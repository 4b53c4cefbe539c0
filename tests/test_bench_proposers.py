"""The bench of proposers: what counts as found, and its accounting, without training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent import knobs
from agent.bench import command
from agent.bench.known import SEEDS, Bank
from agent.bench.proposers import PLANTED, Player, Replies, mended
from agent.errors import UserError
from agent.ledger import State
from agent.propose import ProposeFailed
from agent.resources import default_target
from sandbox.job import Result, Score

CPU = "settings/cpu.py:SETTINGS."


def target() -> dict[str, str]:
    return {"settings/cpu.py": (default_target() / "settings/cpu.py").read_text(encoding="utf-8")}


def moved(**values: float) -> dict[str, knobs.Knob]:
    files = target()
    for edit in knobs.edits(files, {CPU + name: value for name, value in values.items()}):
        files[edit.path] = files[edit.path].replace(edit.search, edit.replace)
    return knobs.find(files)


def test_an_oversight_is_found_half_way_to_its_mend_and_not_the_other_way() -> None:
    start = knobs.find(target())
    assert not any(mended(card, start, start) for card in PLANTED)
    for found, change in ((["larger-unembedding-rate"], {"unembedding_lr": 0.006}),
                          (["gentler-matrix-rate"], {"matrix_lr": 0.053}),
                          ([], {"matrix_lr": 0.48, "unembedding_lr": 0.0007})):
        assert [card for card in PLANTED if mended(card, start, moved(**change))] == found


class Ground:
    """Counts what is trained; a run's value is the seed's."""

    def __init__(self) -> None:
        self.start, self.asked = "s", []
        self.site = SimpleNamespace(repo=Path("/nowhere"), data=None, devices=("cpu",))

    def measure(self, wanted: list[Any]) -> list[Result]:
        self.asked += wanted
        return [Result("r", None, "", {"val": Score(float(one.seed), 1)}, fingerprint={"device": "d"})
                for one in wanted]

    trained = measure


def test_a_known_run_is_looked_up_and_still_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.git.resolve", lambda repo, name, kind: None)
    ground = Ground()
    bank = Bank(ground, 20, tmp_path / "known.json")  # type: ignore[arg-type]
    bank.open()
    for _ in range(2):
        player = Player(bank, 3, State(tip="s"), Replies([]), "ideas 1")
        player.play()
        assert player.runs == len(SEEDS)
    assert len(ground.asked) == bank.trained == len(SEEDS)
    again = Bank(ground, 20, tmp_path / "known.json")  # type: ignore[arg-type]
    again.open()
    assert again.results([("s", 3, 20)], "x")[0].scores["val"].value == 3.0 and again.trained == 1


def test_a_reply_without_an_edit_is_invalid_and_the_replies_end() -> None:
    replies = Replies(["I would raise the learning rate."])
    briefing: Any = SimpleNamespace(files=target(), number=1, tip="s")
    with pytest.raises(ProposeFailed):
        replies.next(briefing)
    assert replies.next(briefing) is None and replies.ended


@pytest.mark.parametrize("given", [["--only", "magic"], ["--only", "hybrid", "--replies", "none.jsonl"],
                                   ["--only", "model"],
                                   ["--model-url", "http://localhost:1/v1", "--model-set", "max_tokens=few"],
                                   ["--model-url", "http://localhost:1/v1", "--model-set", "tokens=600"]])
def test_wrong_options_are_one_line(given: list[str]) -> None:
    with pytest.raises(UserError):
        command.run("proposers", True, given)


def test_the_kept_replies_of_a_model_can_be_read() -> None:
    options = command.parser("proposers", command.BENCHES["proposers"]).parse_args([])
    replies = Replies([json.loads(line) for line in options.replies.read_text(encoding="utf-8").splitlines()])
    files = target() | {"optim.py": (default_target() / "optim.py").read_text(encoding="utf-8")}
    usable, useless = 0, 0
    for number in range(1, 25):
        briefing: Any = SimpleNamespace(files=files, number=number, tip="s")
        try:
            usable += replies.next(briefing) is not None
        except ProposeFailed:
            useless += 1
    assert usable + useless == 24 and usable >= 20


def test_options_are_listed() -> None:
    made = command.parser("proposers", command.BENCHES["proposers"]).parse_args(["--quick", "--seeds", "3"])
    assert made.quick and made.seeds == 3 and json.dumps(made.only) == '""'
