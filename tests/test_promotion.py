"""What a gain came to at another budget: the rule, Fieller's interval, and whole promotions of tiny campaigns."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import git, promotion, report, runs, tiny
from agent.judge import Rule
from agent.ledger import State, replay
from agent.promotion import share, transfer
from agent.records import Estimate, Pair, Promotion, Transfer, from_json, to_json
from agent.show import view
from tests.test_campaign import Script, check_sound, edge, known, serving

__all__ = ["edge"]
RULE = Rule(0.1, (3,), 0.002, 0.0, "min", "final", None)


def pairs(*effects: float | None) -> list[Pair]:
    return [Pair(seed, {"final": 2.0}, {} if effect is None else {"final": 2.0 + effect}, "a", "b",
                 "oom" if effect is None else None) for seed, effect in enumerate(effects)]


def verdict(here: Sequence[float | None], there: Sequence[float | None], rule: Rule = RULE) -> Transfer:
    return transfer("", "start to tip", pairs(*here), pairs(*there), (rule, rule))


HERE = (-0.10, -0.11, -0.09)


@pytest.mark.parametrize(("there", "said"), [
    ((-0.08, -0.07, -0.09), "transfers"), ((-0.03, -0.031, -0.029), "shrinks"), ((-0.08, 0.07, -0.09), "does not show"),
    ((0.03, 0.031, 0.029), "reverses"), ((-0.08, None, -0.09), "reverses"), ((-0.08,), "not measured"),
    ((-0.052, -0.051, -0.05), "transfers"), ((-0.049, -0.048, -0.047), "shrinks")])
def test_the_rule(there: tuple[float | None, ...], said: str) -> None:
    found = verdict(HERE, there)
    assert found.verdict == said, found
    turned = dataclasses.replace(RULE, direction="max")
    other = verdict([-e for e in HERE], [None if e is None else -e for e in there], turned)
    assert other.verdict == said and other.kept == pytest.approx(found.kept)


def test_a_gain_that_was_not_shown_here_has_no_share() -> None:
    found = verdict((-0.1, 0.1, 0.02), (-0.08, -0.07, -0.09))
    assert (found.verdict, found.kept) == ("transfers", ()) and "was not shown at the campaign's budget" in found.reason
    worse = verdict((0.1, 0.11, 0.09), (-0.08, -0.07, -0.09))
    assert worse.verdict == "transfers" and "was not shown" in worse.reason  # and not "-80% of it is left"


def test_what_does_not_show_says_what_would_have_been_seen() -> None:
    found = verdict(HERE, (-0.08, 0.07, -0.09))
    size = float(found.reason.split("an effect of ")[1].split()[0])
    assert found.there is not None and 0.25 < size < 0.35  # sd 0.089, three pairs: noncentral t


def test_the_share_that_is_left_is_covered_as_promised() -> None:
    """2,000 simulated experiments with a true share of 0.6: the 95% interval holds it in 93.5 to 99 %."""
    chance, held, shown = random.Random(3), 0, 0
    for _ in range(2000):
        ends = [verdict([chance.gauss(mean, 0.02) for _ in range(4)], ()).here for mean in (-0.1, -0.06)]
        assert ends[0] is not None and ends[1] is not None
        kept = share(ends[0], ends[1])
        if kept:
            shown += 1
            held += kept[1] <= 0.6 <= kept[2]
    assert shown > 1950 and 0.935 < held / shown < 0.99


def test_the_share_without_noise_here_is_the_scaled_interval() -> None:
    here = Estimate("final", -0.1, -0.1000001, -0.0999999, 4, 1e-9)
    there = Estimate("final", -0.05, -0.06, -0.04, 4, 0.01)
    half = 3.18245 * 0.01 / math.sqrt(4) / 0.1
    assert share(here, there) == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-4)


def test_the_record_and_its_lines() -> None:
    total = verdict(HERE, (-0.08, -0.07, -0.09))
    found = Promotion("small, 30 steps", "small, 60 steps", "small", 60.0, "c" * 40, "val_bpb", "min", "final", 7,
                      "CPU", (total, dataclasses.replace(verdict(HERE, ()), of="001-a", title="a")))
    assert from_json(Promotion, json.loads(json.dumps(to_json(found)))) == found
    text = "\n".join(promotion.lines(found))
    assert "-0.1000 [-0.1248, -0.0752]" in text and "80% [" in text and "a: fewer than two pairs" in text
    state = State(tip=found.tip)
    state.apply("promotion", to_json(found), "t")
    state.apply("promotion", to_json(found), "t")  # the newest of a kind
    assert state.promotions == [found] and state.last_time == ""


# ---------------------------------------------------------------------------------------------------- real campaigns

LONGER = """
[presets.small]

[presets.longer]
budget = { amount = 60 }

[presets.never]
train = { command = "python nothing.py" }
"""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished campaign with two merges, as ``n`` in its folder's ``runs``."""
    place = tmp_path_factory.mktemp("promotion")
    tiny.write_tiny_target(place / "target")
    text = (place / "target/ratchet.toml").read_text().replace("audit = 32", "audit = 0")
    (place / "target/ratchet.toml").write_text('preset = "small"\n' + text + LONGER)
    tiny.commit(place / "target", "Have presets")
    with serving(Script([known("less smoothing"), known("less back-off")])) as (_, model), \
            pytest.MonkeyPatch.context() as patch:
        from agent import cli
        for name, value in model.items():
            patch.setenv(name, value)
        assert cli.edge(["run", str(place / "target"), "--name", "n", "--runs", str(place / "runs")]) == 0
    return place


def test_a_promotion_is_kept_in_the_ledger_and_found_again(campaign: Path, edge: Any) -> None:
    folder = campaign / "runs/n"
    before = check_sound(folder)
    ask = ("promote", "n", "--preset", "longer", "--pairs", "2", "--each", "--runs", str(campaign / "runs"))
    code, out, err = edge(*ask)
    assert code == 0 and "small, 30 steps: 8 runs to go" in err and "longer, 60 steps: 8 runs to go" in err, err
    state = check_sound(folder)
    (found,) = state.promotions
    total, *parts = found.parts
    assert total.verdict in ("transfers", "shrinks") and total.here and total.there
    # known truth: with twice the batches the start's smoothing and back-off cost less
    assert total.here.effect < total.there.effect < -0.3 and view.interval(total.here) in out
    assert [part.of for part in parts] == [merge.candidate for merge in state.merges]
    # the two are on neighbouring lines: git's merge cannot leave the first out, its edits made again can
    assert git.without(folder / "repo.git", state.tip, [state.merges[0].new_tip]) is None
    for part in parts:  # two merges, so the tip without one is the other alone
        assert part.here is not None and part.here.effect < 0 and part.verdict != "not measured"
    seeds = {pair.seed for part in found.parts for pair in (*part.here_pairs, *part.there_pairs)}
    assert seeds.isdisjoint({run.seed for run in state.runs.values()})
    assert (state.phase, state.last_time, state.tip) == (before.phase, before.last_time, before.tip)
    branches = git.run(folder / "repo.git", "for-each-ref", "--format=%(refname)").decode()
    assert "promote" not in branches and "without" not in branches

    code, again, err = edge(*ask, "--json")
    assert code == 0 and "runs to go" not in err and json.loads(again) == to_json(found)
    assert replay(folder / "ledger.jsonl")[0].promotions == [found]
    told = json.loads(edge("status", "n", "--json", "--runs", str(campaign / "runs"))[1])
    assert told["promoted"] == {"longer, 60 steps": total.verdict}
    assert f"promoted  {total.verdict} at longer, 60 steps" in edge("status", "n", "--runs", str(campaign / "runs"))[1]
    assert f"promoted    {parts[0].verdict} at longer" in edge("show", "1", "--runs", str(campaign / "runs"))[1]
    assert "## At another budget" in (folder / "report/report.md").read_text() == report.markdown(state)


def test_a_promotion_that_was_killed_goes_on_with_what_it_had(campaign: Path, edge: Any) -> None:
    """A torn job (no result) is run again beside its folder; the others are found."""
    ask = ("promote", "n", "--steps", "90", "--pairs", "2", "--runs", str(campaign / "runs"))
    assert edge(*ask)[0] == 0
    first = replay(campaign / "runs/n/ledger.jsonl")[0].promotions[-1]
    torn = next((campaign / "runs/n/jobs").glob("promote-*-n90"))
    (torn / "result.json").unlink()
    code, _, err = edge(*ask)
    assert code == 0 and "90 steps: 1 runs to go, 3 found again" in err
    again = replay(campaign / "runs/n/ledger.jsonl")[0].promotions[-1]
    assert [part.there for part in again.parts] == [part.there for part in first.parts]  # the target is deterministic
    assert (torn.with_name(torn.name + ".2") / "result.json").exists()


@pytest.mark.parametrize(("options", "said"), [
    ((), "Nothing says where"), (("--preset", "huge"), "no preset 'huge'. Choose one of: longer, never, small"),
    (("--steps", "30"), "--steps 30 is not more than the 30"), (("--preset", "small"), "the campaign's own budget"),
    (("--steps", "60", "--pairs", "1"), "has no interval"),
    (("--preset", "never", "--pairs", "2"), "The start itself fails to train at never, 30 steps, seed 1200000007")])
def test_what_cannot_be_promoted(campaign: Path, edge: Any, options: tuple[str, ...], said: str) -> None:
    code, out, err = edge("promote", "n", *options, "--runs", str(campaign / "runs"))
    assert (code, out) == (1, "") and said in err and "Traceback" not in err


def test_a_run_without_a_merge_has_nothing_to_promote(tmp_path: Path, edge: Any) -> None:
    from tests.night import Night
    Night(tmp_path / "runs", "empty")
    code, _, err = edge("promote", "empty", "--steps", "60")
    assert code == 1 and "merged nothing" in err


def test_a_promotion_makes_no_old_run_the_newest(campaign: Path, tmp_path: Path) -> None:
    from tests.night import whole_night
    older = whole_night(tmp_path, "older", day=1)
    whole_night(tmp_path, "newer", day=2)
    total = verdict(HERE, HERE)
    older.ledger.append("promotion", Promotion("a", "b", "", 60.0, "c", "val_bpb", "min", "final", 7, "CPU", (total,)))
    assert runs.names(tmp_path) == ["older", "newer"]


def test_a_merge_is_left_out_of_a_tip_by_gits_own_merge(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(30)]

    def write(*changed: int) -> None:
        text = [f"{line} changed" if number in changed else line for number, line in enumerate(lines)]
        (tmp_path / "t/file.txt").write_text("\n".join(text))

    git_dir = tmp_path / "t/.git"
    tiny.write_repository(tmp_path / "t", {"file.txt": "\n".join(lines)})
    commits = []
    for changed in ((3,), (3, 20)):
        write(*changed)
        tiny.commit(tmp_path / "t", f"Change {changed}")
        commits.append(git.run(git_dir, "rev-parse", "HEAD").decode().strip())
    tree = git.without(git_dir, commits[1], [commits[0]])
    assert tree is not None
    text = git.run(git_dir, "show", f"{tree}:file.txt").decode()
    assert "line 3\n" in text and "line 20 changed" in text
    (tmp_path / "t/file.txt").write_text(text.replace("line 3\n", "line 3 other\n"))
    tiny.commit(tmp_path / "t", "The same line")
    assert git.without(git_dir, "HEAD", [commits[0]]) is None
    assert np.all([git.resolve(git_dir, name) for name in commits])
