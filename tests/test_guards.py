"""Guards: counts to the last one, jitter by pairs and a dead band, creep over merges; and in a real campaign."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from agent import git, guards, report, tiny
from agent.bank import Bank
from agent.config import Guards, load, parse
from agent.errors import UserError
from agent.guards import complaint, unseen, weigh
from agent.ledger import State, replay
from agent.merge import figures
from agent.recompute import recompute
from agent.records import Purpose, Result, Run, Verdict, from_json, to_json
from agent.show import view
from agent.site import Site
from sandbox.job import Score
from tests.test_campaign import Script, attempt, check_sound, edge, known, serving

__all__ = ["edge"]
START = Result("start", None, peak_memory_mb=100.0, evaluate_charge=2.0, inference_charge=1.0, parameters=1000,
               weights_bytes=4000)
ALL = Guards(parameters=1.05, weights=1.05, memory=1.1, inference=1.1, evaluation=1.1)


def run(**changes: Any) -> Result:
    return dataclasses.replace(START, **changes)


def pairs(name: str, *values: float) -> list[tuple[Result, Result]]:
    return [(START, run(**{name: value})) for value in values]


@pytest.mark.parametrize(("count", "refused"), [(1050, False), (1051, True), (900, False)])
def test_a_count_is_held_to_the_last_one(count: int, refused: bool) -> None:
    found = weigh([START], (), pairs("parameters", count))
    assert found["parameters"].ratio == count / 1000
    said = complaint(ALL, found)
    assert bool(said) is refused
    if refused:
        assert said == "over the cap on parameters: 1.05k is 1.051 times the start's, and guards.parameters allows 1.05"


def test_a_count_is_the_largest_of_any_run() -> None:
    assert weigh([START], (), pairs("parameters", 1000, 2000, 1000))["parameters"].ratio == 2


def test_the_start_itself_and_a_cap_of_nought_refuse_nothing() -> None:
    found = weigh([START, START], (), [(START, START)] * 3)
    assert {guard.ratio for guard in found.values()} == {1.0} and len(found) == 5
    assert not complaint(ALL, found)
    assert not complaint(Guards(), weigh([START], (), pairs("parameters", 9000)))


def test_jitter_is_judged_by_the_median_and_a_dead_band_that_is_wider_below_three_pairs() -> None:
    def said(*seconds: float) -> str:
        return complaint(ALL, weigh([START], (), pairs("inference_charge", *seconds)))
    assert not said(1.2, 9.0, 1.1)  # one run on a busy core
    assert not said(1.26, 1.26, 1.26) and "over the cap on inference" in said(1.27, 1.27, 1.27)  # 1.1 * 1.15 = 1.265
    assert not said(1.42) and "30% for jitter" in said(1.44)  # 1.1 * 1.3 = 1.43


def test_a_drifting_machine_is_no_cost() -> None:
    """Later runs take three times as long, on both sides."""
    slow = [(run(inference_charge=3.0), run(inference_charge=3.1))] * 3
    assert weigh([START], (), slow)["inference"].ratio == pytest.approx(3.1 / 3)


def test_what_creeps_in_over_merges_is_held_against_the_start() -> None:
    steps = [[(run(inference_charge=1.12**n), run(inference_charge=1.12 ** (n + 1)))] * 3 for n in range(3)]
    assert not complaint(ALL, weigh([START], (), steps[0]))
    found = weigh([START], steps[:1], steps[1])
    assert found["inference"].ratio == pytest.approx(1.12**2)
    assert not complaint(ALL, found)  # 1.254 is within 1.265
    assert complaint(ALL, weigh([START], steps[:2], steps[2]))
    bigger = pairs("parameters", 1100)  # a count needs no chain: the candidate has all that was merged
    assert complaint(ALL, weigh([START], (pairs("parameters", 1049),), bigger))


def test_jitter_that_adds_up_over_merges_is_no_cost() -> None:
    """Six merges of 5 % each by chance, while the candidate's own runs take as long as the start's."""
    lucky = [[(run(evaluate_charge=2.0), run(evaluate_charge=2.1))] * 3] * 6
    assert weigh([START], lucky, pairs("evaluate_charge", 2.0, 2.0, 2.0))["evaluation"].ratio == 1.0


def test_a_failed_run_says_nothing_and_what_was_not_measured_is_unchanged() -> None:
    failed = [(START, run(fault="crash", parameters=9000, peak_memory_mb=900.0))]
    assert weigh([START], (), failed) == {}
    old = run(inference_charge=0.0)  # of a ledger that was written before this was measured
    assert "inference" not in weigh([old], (), [(old, old)])
    assert weigh([START], ([(old, old)],), pairs("inference_charge", 1.1))["inference"].ratio == pytest.approx(1.1)


def test_a_cap_that_nothing_can_break_is_named() -> None:
    own = Result("prints its own", None, peak_memory_mb=9.0)
    assert unseen(Guards(parameters=1.1, memory=1.1), [own]) == ["parameters"]
    assert unseen(ALL, [START]) == unseen(Guards(), [own]) == []


def test_a_cap_below_the_start_is_refused() -> None:
    with pytest.raises(UserError, match=r"guards.memory is below 1.*got 0.5"):
        parse('[train]\ncommand = "x"\n[evaluate]\npattern = "(x)"\n[guards]\nmemory = 0.5\n', "ratchet.toml")


def test_what_is_too_small_to_be_measured_is_alike() -> None:
    """A run of a tenth of a second is seen once, at 3 MiB or at 30."""
    small = run(peak_memory_mb=3.0, inference_charge=0.003)
    found = weigh([small], (), [(small, run(peak_memory_mb=30.0, inference_charge=0.03))])
    assert found["memory"].ratio == found["inference"].ratio == 1.0 and found["memory"].value == 30


def test_gpu_memory_counts_where_there_is_any() -> None:
    assert guards.seen(run(gpu_memory_mb=7.0))["memory"] == 7


def test_the_trailer_says_each_measure_with_its_change() -> None:
    found = weigh([START], (), [(START, run(parameters=1_200_000, weights_bytes=4_800_000))])
    assert guards.text(found) == ("parameters 1.20M (+119900.0 %), weights 4.80 MB (+119900.0 %), "
                                  "memory 100 MiB (+0.0 %), inference 1.00 s (+0.0 %), evaluation 2.00 s (+0.0 %)")


def test_records_of_an_older_version_are_read() -> None:
    told = to_json(Verdict("a", "accepted", "judge", "better"))
    del told["guards"]
    assert from_json(Verdict, told).guards == {}
    result = to_json(START)
    del result["inference_charge"]
    assert from_json(Result, result).inference_charge == 0.0


@pytest.mark.parametrize("capped", [True, False])
def test_a_patch_that_doubles_the_parameters(tmp_path: Path, edge: Any, capped: bool) -> None:
    """... is merged without a cap, and refused after its tiny run with one: the cap is what refuses it."""
    target = tmp_path / "target"
    tiny.write_tiny_target(target)
    titles = ["twice the parameters", *["less back-off"] * capped]
    caps = "\n[guards]\nparameters = 1.05\nweights = 3\nmemory = 9\ninference = 9\n" if capped else ""
    text = (target / "ratchet.toml").read_text().replace("audit = 32", "audit = 0")  # not what is tried here
    (target / "ratchet.toml").write_text(text + caps)
    tiny.commit(target, "Cap what a merge may cost")
    with serving(Script([known(title) for title in titles])) as (_, model):
        code, _, err = edge("run", str(target), "--name", "n", "--proposer", "llm", model=model)
    assert (code, err) == (0, "")
    state = check_sound(tmp_path / "runs/n")
    doubled, other = attempt(state, titles[0]), attempt(state, titles[-1])
    assert doubled.verdict is not None and other.verdict is not None and other.merge is not None
    shown = "\n".join(view.show_lines(state, doubled, "x"))
    page = report.markdown(state)
    if capped:
        assert doubled.merge is None and (doubled.verdict.stage, doubled.verdict.fault) == ("preflight", None)
        assert doubled.verdict.reason == ("over the cap on parameters: 512 is 2.000 times the start's, and "
                                          "guards.parameters allows 1.05")
        assert [run.purpose for run in doubled.runs] == ["preflight"]
        assert "| parameters | 256 | +0.0 % | +5.0 % |" in page and "Not capped by `[guards]`: evaluation." in page
        ratio = 1.0
    else:
        assert doubled.merge is not None, doubled.verdict
        assert doubled.verdict.guards["parameters"].ratio == 2
        assert "guards      parameters 512 (+100.0 %), weights " in shown
        assert "| parameters | 512 | +100.0 % | none |" in page
        ratio = 2.0
    told = git.run(tmp_path / "runs/n/repo.git", "log", "-1", "--format=%(trailers:key=Guards,valueonly)",
                   other.merge.new_tip).decode()
    assert f"parameters {256 * ratio:.0f} ({(ratio - 1) * 100:+.1f} %), weights " in told
    assert {"parameters", "weights", "inference", "evaluation"} <= set(other.verdict.guards)
    assert other.verdict.guards["parameters"].ratio == ratio  # the cap and the trailer are relative to the start
    assert all(one.same for one in recompute(state, other, tmp_path / "runs/n/repo.git")) and figures(other.verdict)
    assert replay(tmp_path / "runs/n/ledger.jsonl")[0] == state


def test_a_cap_that_this_target_cannot_show_stops_the_campaign_at_its_start(tmp_path: Path, edge: Any) -> None:
    target = tmp_path / "target"
    tiny.write_tiny_target(target, served=False)
    with (target / "ratchet.toml").open("a") as file:
        file.write("\n[guards]\nparameters = 1.05\n")
    tiny.commit(target, "Cap what nothing shows")
    with serving(Script([known("less back-off")])) as (_, model):
        code, _, err = edge("run", str(target), "--name", "n", "--proposer", "llm", model=model)
    assert code == 1 and "guards.parameters is set, and no run of this target shows its parameters" in err


def test_an_audit_is_no_run_of_the_start(tmp_path: Path) -> None:
    """It trains nothing, so its charge of nought would halve what a candidate's run may cost."""
    tiny.write_tiny_target(tmp_path / "t")
    (tmp_path / "t/.git").rename(tmp_path / "repo.git")
    start = git.resolve(tmp_path / "repo.git", "HEAD") or ""
    tree = git.resolve(tmp_path / "repo.git", "HEAD", "tree") or ""
    state = State(campaign={"steps": 30}, tip=start)
    scored = run(scores={"val": Score(2.0)}, charge_seconds=7.0)
    again = run(scores={"val": Score(2.0)})
    cases: tuple[tuple[str, Purpose, Result], ...] = (("a", "baseline", scored), ("a-audit", "audit", again))
    for name, purpose, result in cases:
        state.apply("run_started", to_json(Run(name, purpose, tree, 1, 30, "cpu", f"jobs/{name}")), "")
        state.apply("run_finished", to_json(dataclasses.replace(result, id=name)), "")
    place = Site(tmp_path, "", start, load(tmp_path / "t"), None, ("cpu",), 3, 0)
    assert [result.charge_seconds for result in Bank(place, state).at_start()] == [7.0]
