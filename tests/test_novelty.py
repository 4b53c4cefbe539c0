"""Novelty: the same behaviour found by runs, and retries of refused ideas; in whole campaigns too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agent import cli, tiny
from agent.ledger import State, replay
from agent.llm.scripted import Fixed, Say, ScriptedModel, Status
from agent.novelty import Novelty, shape
from agent.records import Candidate, Edit, Patch, Prediction, Proposal, Result, Run, Verdict, to_json
from sandbox.job import Score


def diff(*lines: str, path: str = "train.py") -> str:
    return "\n".join([f"diff --git a/{path} b/{path}", f"--- a/{path}", f"+++ b/{path}", "@@ -1 +1 @@", *lines, ""])


def add(state: State, name: str, text: str = "", outcome: str = "", author: str = "llm", different: str = "",
        stage: str = "judge") -> Candidate:
    prediction = Prediction(different=different)
    state.apply("proposal", to_json(Proposal(name, "tip", f"Idea {name}", "h", author, prediction=prediction)), "t")  # type: ignore[arg-type]
    candidate = Candidate(name, name, "tip", f"head{name}", f"tree{name}", Patch(text, ("train.py",), 1, 1, "c", name))
    if outcome:
        state.apply("candidate", to_json(candidate), "t")
        state.apply("verdict", to_json(Verdict(name, outcome, stage, "why")), "t")  # type: ignore[arg-type]
    return candidate


def ran(candidate: str | None, weights: str = "", seed: int = 1, steps: int = 300, value: float | None = 2.5,
        purpose: str = "pair", points: int = 0, fault: str | None = None) -> tuple[Run, Result]:
    name = f"{candidate}-{seed}-{purpose}"
    scores = {} if value is None else {"val": Score(value)}
    return (Run(name, purpose, f"tree{candidate}", seed, steps, "cpu", "f", candidate),  # type: ignore[arg-type]
            Result(name, fault, scores=scores, weights_sha256=weights,  # type: ignore[arg-type]
                   curve=tuple((n, 5 - n / 7) for n in range(points))))


def state_of(*names: str) -> State:
    state = State(tip="tip")
    for name in names:
        add(state, name, diff("+x"), "rejected")
    return state


# --- by behaviour ----------------------------------------------------------------------------------------------------

def test_the_same_weights_from_the_same_seed_are_one_behaviour() -> None:
    novelty = Novelty(state_of("1", "2", "3"))
    assert novelty.same_as(*ran("1", "w")) == "" and novelty.same_as(*ran("1", "w")) == ""
    assert novelty.same_as(*ran("2", "w")) == "1"
    assert novelty.same_as(*ran("3", "w", seed=2)) == "" and novelty.same_as(*ran("3", "w", steps=12)) == ""
    assert novelty.same_as(*ran("3", "w", value=2.4)) == ""  # the same weights, but another model reads them


def test_the_tiny_run_shows_it_before_a_full_one() -> None:
    novelty = Novelty(state_of("1", "2"))
    assert novelty.same_as(*ran("1", "w", steps=12, value=None, purpose="preflight")) == ""
    assert novelty.same_as(*ran("2", "w", steps=12, value=None, purpose="preflight")) == "1"


def test_without_weights_a_long_curve_and_the_score_must_agree() -> None:
    novelty = Novelty(state_of("1", "2", "3", "4"))
    assert novelty.same_as(*ran("1", points=20)) == "" and novelty.same_as(*ran("2", points=20)) == "1"
    assert novelty.same_as(*ran("3", points=4)) == "" and novelty.same_as(*ran("4", points=4)) == ""


def test_faults_incumbents_and_bundles_show_nothing() -> None:
    state = state_of("1", "2")
    add(state, "gate", author="gate")
    novelty = Novelty(state)
    assert novelty.same_as(*ran("gate", "w")) == "" and novelty.same_as(*ran(None, "w")) == ""
    assert novelty.same_as(*ran("1", "w", fault="crash")) == "" and novelty.same_as(*ran("2", "w")) == ""


def test_who_ran_first_stays_and_a_restart_knows_it_too() -> None:
    state = state_of("1", "2")
    novelty = Novelty(state)
    assert novelty.same_as(*ran("2", "w")) == "" and novelty.same_as(*ran("1", "w")) == "2"
    run, result = ran("2", "w")
    state.apply("run_started", to_json(run), "t")
    state.apply("run_finished", to_json(result), "t")
    assert Novelty(state).same_as(*ran("1", "w")) == "2"


def test_what_was_never_judged_stands_in_nobodys_way() -> None:
    state = State(tip="tip")
    add(state, "1", diff("+x"), "inconclusive")
    add(state, "2", diff("+x"), "rejected", stage="patch")
    add(state, "3", diff("+x"))
    novelty = Novelty(state)
    assert [novelty.same_as(*ran(name, "w")) for name in ("1", "2", "3")] == ["", "", ""]


# --- refused ideas again ---------------------------------------------------------------------------------------------

OLD = diff("-lr = 0.1", "+lr = 0.2")


def test_a_retry_must_say_what_is_different() -> None:
    state = State(tip="tip")
    add(state, "1", OLD, "rejected")
    retry = add(state, "2", diff("-lr = 0.1", "+lr  =  3e-4"))
    novelty = Novelty(state)
    said = novelty.objection(state.attempts["2"], retry)
    assert said.startswith("like 1 (Idea 1), which was refused") and "`different`" in said
    told = add(state, "3", diff("-lr = 0.1", "+lr = 0.3"), different="lower, not higher")
    assert novelty.objection(state.attempts["3"], told) == ""
    search = add(state, "4", diff("-lr = 0.1", "+lr = 0.4"), author="search")
    assert novelty.objection(state.attempts["4"], search) == ""


def test_what_was_merged_or_never_tried_is_no_refused_idea() -> None:
    for outcome, stage in (("accepted", "judge"), ("rejected", "patch"), ("inconclusive", "judge")):
        state = State(tip="tip")
        add(state, "1", OLD, outcome, stage=stage)
        retry = add(state, "2", diff("-lr = 0.1", "+lr = 0.3"))
        assert Novelty(state).objection(state.attempts["2"], retry) == ""


def test_other_lines_and_other_files_are_other_ideas() -> None:
    state = State(tip="tip")
    add(state, "1", OLD, "rejected")
    novelty = Novelty(state)
    for number, text in enumerate((diff("-wd = 0.1", "+wd = 0.2"), diff("-lr = 0.1", "+lr = 0.2", path="model.py"),
                                   diff("-lr = 0.1", "+lr = cosine(0.2)")), start=2):
        other = add(state, str(number), text)
        assert novelty.objection(state.attempts[str(number)], other) == ""


def test_shapes_mask_numbers_and_space_alone() -> None:
    assert shape(diff("-a = 1", "+a = -2.5e-3")) == {"train.py-a = #", "train.py+a = #"}
    assert shape(diff("+x1 = y2")) == {"train.py+x1 = y2"} and shape(diff("+", "-  ")) == frozenset()
    assert shape(diff(*[f"+line {n} {chr(97 + n % 26)}{n}" for n in range(500)])) == frozenset()


# --- in a campaign ---------------------------------------------------------------------------------------------------

REFUSAL = Say("I'm sorry, but I can't help with changing this code.")


def campaign(folder: Path, replies: list[Say], monkeypatch: object, mended: Say | None = None) -> State:
    """A campaign on the tiny target; ``replies`` by the attempt's number, ``mended`` in a repair round."""
    tiny.write_tiny_target(folder / "target")
    path = folder / "target" / "ratchet.toml"
    path.write_text(path.read_text().replace("search = false", "search = false\nparallel = 1"))  # replies in order
    tiny.commit(folder / "target", "One question at a time")

    def answer(body: dict[str, Any]) -> Fixed:
        found = re.search(r"This is attempt (\d+)", body["messages"][-1]["content"])
        if found:
            number = int(found[1])
            return replies[number - 1] if number <= len(replies) else Status(401, {"error": {"message": "over"}})
        return mended if mended and "SMOOTHING" in body["messages"][-2]["content"] else REFUSAL

    with ScriptedModel([], then=answer) as model:
        for key, value in (("OPENAI_BASE_URL", model.base_url), ("OPENAI_API_KEY", "sk-tiny-0123456789"),
                           ("RATCHET_MODEL", "scripted")):
            monkeypatch.setenv(key, value)  # type: ignore[attr-defined]
        monkeypatch.chdir(folder)  # type: ignore[attr-defined]
        assert cli.edge(["run", "target", "--slots", "1", "--budget-runs", "5"]) == 0
    (place,) = [path for path in (folder / "runs").iterdir() if not path.name.startswith(".")]
    return replay(place / "ledger.jsonl")[0]


def says(title: str, edit: Edit, different: str = "") -> Say:
    return Say({"title": title, "hypothesis": "Because.", "direction": "optimizer", "expected_effect": -0.1,
                "expected_low": -0.2, "expected_high": 0.0, "step_cost": 1.0, "check": "", "different": different,
                "edits": [{"path": edit.path, "search": edit.search, "replace": edit.replace}]})


def test_an_idea_in_other_words_is_not_trained_twice(tmp_path: Path, monkeypatch: object) -> None:
    first = tiny.KNOWN["more smoothing"].edit
    again = Edit(first.path, first.search, "SMOOTHING = 4.0 * 100")
    state = campaign(tmp_path, [says("More smoothing", first), says("Smooth more", again)], monkeypatch)
    made = [attempt for attempt in state.attempts.values() if attempt.candidate]
    one, two = sorted(made, key=lambda attempt: attempt.verdict is not None and attempt.verdict.stage == "preflight")
    assert one.verdict is not None and two.verdict is not None and one.verdict.stage == "judge"
    assert (two.verdict.outcome, two.verdict.stage) == ("rejected", "preflight")
    assert f"behaves exactly as {one.proposal.id}: the same weights" in two.verdict.reason
    assert not any(run.trains for run in two.runs)


def test_a_retry_without_a_reason_is_mended_or_refused(tmp_path: Path, monkeypatch: object) -> None:
    first = tiny.KNOWN["more smoothing"].edit
    again = Edit(first.path, first.search, "SMOOTHING = 500.0")
    replies = [says("More smoothing", first), says("Smooth more", again)]
    state = campaign(tmp_path, replies, monkeypatch, says("Smooth more", again, "further up, to see whether it turns"))
    two = next(attempt for attempt in state.attempts.values() if attempt.proposal.title == "Smooth more")
    assert two.proposal.cost.calls == 2 and two.verdict is not None and two.verdict.stage == "judge"
    assert two.proposal.prediction is not None and two.proposal.prediction.different.startswith("further up")
