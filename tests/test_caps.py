"""Caps, forecasts, prices and the clock: the rules by themselves, and random campaigns against theirs."""

from __future__ import annotations

import datetime
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.campaign import Campaign
from agent.config import Caps, Model, parse
from agent.errors import UserError
from agent.forecast import LAST, forecast, scatter
from agent.ledger import Mark
from agent.llm import prices
from agent.records import Certification, Cost, Proposal, Result, Run, Verdict
from agent.show.view import forecast_line
from agent.site import Site, until_time
from agent.spending import Spending, audit_runs, parse_caps
from sandbox.job import Score
from tests.night import Night
from tests.test_campaign import environment, ratchet, serving
from tests.test_hooks import one_then_end

NOW = datetime.datetime(2026, 3, 1, 22, 0, 10, tzinfo=datetime.UTC)


def opened(folder: Path, pending: int = 0, slots: int = 2, proposer: str = "ideas",
           **caps: float) -> tuple[Night, Spending]:
    text = '[train]\ncommand = "python t.py"\n[evaluate]\npattern = "loss: (.*)"\naudit = 0\n[judge]\nfinal_pairs = 2\n'
    config = parse(text, "ratchet.toml").model_copy(update={"caps": Caps.model_validate(caps)})
    night = Night(folder / "runs", "n", proposer=proposer)
    site = Site(night.folder, "", "a" * 40, config, None, ("cpu",) * slots, 0, 0)
    return night, Spending(site, night.state, None, None, lambda: pending)


def train(night: Night, number: int, seconds: float, ended: bool = True) -> None:
    name = f"r{number}"
    night.ledger.append("run_started", Run(name, "pair", "d" * 40, number, 300, "cpu", f"jobs/{name}"))
    if ended:
        night.ledger.append("run_finished", Result(name, None, scores={"val": Score(1.0)}, seconds=seconds))


def ask(night: Night, number: int, usd: float, tokens: int) -> None:
    night.ledger.append("proposal", Proposal(f"{number:03d}-x", night.state.tip, "X", "", "llm",
                                             cost=Cost(usd, tokens, 0, 1)))


def test_gpu_hours_count_what_runs_and_hold_back_the_final_number(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, gpu_hours=1000 / 3600)
    assert not spending.forbids("pair", NOW)  # nothing is known yet
    train(night, 1, 100)
    assert not spending.forbids("pair", NOW)
    for number in range(2, 5):
        train(night, number, 100)
    train(night, 5, 100, ended=False)
    # 4 ended, 1 runs, 1 more and 4 of the final number: 1000 s
    assert not spending.forbids("pair", NOW)
    train(night, 6, 100, ended=False)
    assert spending.forbids("pair", NOW) and spending.reached(NOW).endswith("GPU-hours")
    assert not spending.forbids("final", NOW)
    assert spending.final_pairs(NOW) == 2
    assert spending.left(NOW) == 0


def test_a_closing_audit_can_be_held_back_too(tmp_path: Path) -> None:
    _, plain = opened(tmp_path / "a", experiments=100)
    _, audited = opened(tmp_path / "b", experiments=100, audit_pairs=4)
    assert plain.reserved(100) == 4 and audited.reserved(100) == 4 + audit_runs(4, 1, 2) == 16
    assert audit_runs(0, 3, 2) == 0 and audit_runs(8, 3, 3) == 8 * 4 + 16 + 6


def test_one_question_at_a_time_until_a_reply_shows_its_price(tmp_path: Path) -> None:
    night, spending = opened(tmp_path / "a", pending=1, tokens=1000)
    assert spending.forbids_question() and not spending.questions_spent
    ask(night, 1, 0.0, 300)
    assert not spending.forbids_question()  # 300 + 2 x 300
    ask(night, 2, 0.0, 200)
    assert spending.forbids_question() and not spending.questions_spent  # 500 + 300, and one is on its way
    ask(night, 3, 0.0, 250)
    assert spending.questions_spent == "1000 tokens"


def test_replies_that_nobody_took_are_counted(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, tokens=1000)
    ask(night, 1, 0.0, 300)
    night.ledger.append("lost", {"replies": 1})
    night.ledger.append("stopped", {"reason": "interrupted"})
    night.ledger.append("started", dict(night.state.campaign))
    assert spending.tokens(0) == 600 and not spending.questions_spent
    config = night.state.campaign["config"] | {"model": {"parallel": 2}}
    night.ledger.append("started", night.state.campaign | {"config": config})  # nothing since: that one was killed
    night.ledger.append("started", night.state.campaign | {"config": config})
    assert spending.tokens(0) == 1200 and spending.questions_spent


def test_dollars_are_those_of_the_model_and_of_the_slots(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, usd=10, usd_per_gpu_hour=36)
    train(night, 1, 100)  # a dollar each
    ask(night, 1, 2.5, 10)
    assert spending.dollars(0, 0) == pytest.approx(3.5)
    assert not spending.forbids("pair", NOW) and not spending.forbids_question()  # 3.5 + 1 + 4; 3.5 + 4 + 2.5
    ask(night, 2, 0.5, 10)
    assert not spending.forbids("pair", NOW) and spending.forbids_question()
    ask(night, 3, 1.5, 10)
    assert spending.forbids("pair", NOW) and spending.reached(NOW) == "$10"


def test_hours_count_the_work_of_earlier_processes(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, hours=1)
    assert spending.deadline == datetime.datetime(2026, 3, 1, 23, 0, 1, tzinfo=datetime.UTC)
    night._now += datetime.timedelta(minutes=20)
    night.ledger.append("stopped", {"reason": "interrupted"})
    night._now += datetime.timedelta(hours=9)
    night.ledger.append("started", dict(night.state.campaign))
    assert spending.deadline == night._now + datetime.timedelta(minutes=40) - datetime.timedelta(seconds=1)


def test_once_the_time_is_up_no_final_run_begins_and_those_on_their_way_are_taken(tmp_path: Path) -> None:
    _, spending = opened(tmp_path, hours=1)
    assert not spending.late(NOW)
    assert spending.late(NOW + datetime.timedelta(hours=1))
    begun, busy, results = list[str](), ["first"], dict[str, str]()

    def start(need: str, device: str, _: None) -> None:
        begun.append(need)

    def wait(_: float) -> list[Any]:
        results.update(dict.fromkeys(busy, "result"))
        busy.clear()
        return []

    campaign: Any = SimpleNamespace(
        needs=SimpleNamespace(known=results.get, device_for=lambda _: "cpu", start=start, on_its_way=busy.count),
        slots=SimpleNamespace(busy=busy, free=lambda _: "cpu", wait=wait), steering=SimpleNamespace(resting=False),
        tick=lambda **_: None, absorb=lambda _: None)
    needs: Any = [Word("first"), Word("second")]
    assert Campaign.complete(campaign, needs, lambda: True) == ["result"] and not begun
    busy.append("second")
    assert Campaign.complete(campaign, needs) == ["result", "result"] and not begun


class Word(str):
    """A need that is known by its name alone."""

    seed = 1


def test_the_folder_on_disk_is_measured(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, disk_gb=0.004)
    train(night, 1, 1)
    assert not spending.forbids("pair", NOW)
    (night.folder / "big").write_bytes(b"x" * 5_000_000)
    spending._look_again = 0
    assert spending.reached(NOW) == "0.004 GB on the disk"


def test_a_forecast_follows_the_tightest_cap(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, slots=1, experiments=50, gpu_hours=2000 / 3600)
    before = forecast(spending.site, night.state, spending, NOW)
    assert (before["basis"], before["seconds_a_run"]) == ("limits", 600)
    train(night, 1, 100)
    found = forecast(spending.site, night.state, spending, NOW)
    # 2000 s: 4 final runs are held back, of which half are counted before anything is merged: 16 + 2
    assert (found["basis"], found["ends"], found["experiments"]) == ("baseline", "GPU-hours", 17 + 1)
    assert found["gpu_hours"] == pytest.approx(1800 / 3600, abs=1e-4)


def judged(night: Night, number: int) -> None:
    """A run and a verdict, a hundred seconds."""
    train(night, number, 100)
    ask(night, number, 0.0, 0)
    night.ledger.append("verdict", Verdict(f"{number:03d}-x", "rejected", "judge", "no"))
    night._now += datetime.timedelta(seconds=100)


@pytest.mark.parametrize("back", ["before", "after"])
def test_a_clock_that_goes_back_ends_no_night_and_no_forecast(tmp_path: Path, back: str) -> None:
    night, spending = opened(tmp_path, slots=1, experiments=50)
    if back == "before":
        night._now -= datetime.timedelta(hours=1)
    train(night, 1, 100)
    night.ledger.append("forecast", forecast(spending.site, night.state, spending, night._now))
    if back == "after":
        night._now -= datetime.timedelta(hours=1)
    for number in range(2, 14):
        judged(night, number)
    found = forecast(spending.site, night.state, spending, night._now)
    assert found["hours"] > 0 and (found["ends"], found["judged"]) == ("experiments", 12)


def test_forecasts_of_an_older_ledger_and_of_runs_that_were_lost_do_no_harm(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, slots=1, experiments=50)
    night.ledger.append("run_started", Run("r1", "baseline", "d" * 40, 1, 300, "cpu", "jobs/r1"))
    night.ledger.append("run_finished", Result("r1", "infra", "stopped"))
    assert forecast(spending.site, night.state, spending, NOW)["seconds_a_run"] == 600
    train(night, 2, 100)
    old = forecast(spending.site, night.state, spending, NOW)
    del old["disk"], old["off"]
    night.ledger.append("forecast", old)
    for number in range(3, 15):
        judged(night, number)
    assert forecast(spending.site, night.state, spending, NOW)["judged"] == 12 and "about" in forecast_line(old)


def test_an_endless_cap_is_refused() -> None:
    with pytest.raises(UserError, match="hours"):
        parse('[train]\ncommand = "x"\n[evaluate]\npattern = "y (.)"\n[caps]\nhours = inf\n', "ratchet.toml")


def test_a_forecast_of_a_campaign_without_a_cap_looks_an_hour_ahead_and_says_so(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, slots=1)
    train(night, 1, 100)
    found = forecast(spending.site, night.state, spending, NOW)
    assert "100 s a run; without a cap: an hour from now; " in forecast_line(found)
    assert "; ended by GPU-hours; " in forecast_line(found | {"ends": "GPU-hours"})


def test_a_forecast_of_a_list_with_an_end_ends_with_its_last_proposal(tmp_path: Path) -> None:
    night, spending = opened(tmp_path, slots=1, experiments=500)
    before = forecast(spending.site, night.state, spending, NOW, proposals=6)
    assert (before["ends"], before["experiments"]) == (LAST, 2 * 6 + 2)  # half of four final runs: no merge yet
    train(night, 1, 100)
    for number in range(2, 14):
        judged(night, number)
    ask(night, 14, 0.0, 0)
    found = forecast(spending.site, night.state, spending, night._now, proposals=5)
    assert (found["ends"], found["experiments"]) == (LAST, round(13 + 13 / 12 * 6 + 2))  # one is in work
    assert "ended by the last proposal; " in forecast_line(found)
    assert forecast(spending.site, night.state, spending, night._now, proposals=5000)["ends"] == "experiments"


def test_a_forecast_counts_as_calibrated_from_two_candidates_a_batch_on(tmp_path: Path) -> None:
    """However alike they are: here they do not differ at all."""
    night, spending = opened(tmp_path, slots=1, experiments=50)
    told = []
    for number in range(1, 20):
        judged(night, number)
        if number == 1:  # else a certification is expected to be yet to come
            night.ledger.append("certify", Certification("001-x", night.state.tip, "d" * 40, 1, 0))
        told.append(forecast(spending.site, night.state, spending, night._now)["basis"])
    assert told == ["baseline"] * 9 + ["rough"] * 7 + ["calibrated"] * 3


def test_a_candidate_in_certification_has_most_of_its_runs_before_it(tmp_path: Path) -> None:
    """Twelve took one run, two took nine; one has had four by now, and nothing comes after it."""
    night, spending = opened(tmp_path, slots=1, experiments=500)
    number = 0
    for candidate, runs in enumerate([1] * 6 + [9] + [1] * 6 + [9] + [4], 1):
        ask(night, candidate, 0.0, 0)
        for _ in range(runs):
            number += 1
            name = f"r{number}"
            night.ledger.append("run_started", Run(name, "pair", "d" * 40, number, 300, "cpu", f"jobs/{name}",
                                                   candidate=f"{candidate:03d}-x"))
            night.ledger.append("run_finished", Result(name, None, scores={"val": Score(1.0)}, seconds=100))
        if candidate < 15:
            night.ledger.append("verdict", Verdict(f"{candidate:03d}-x", "rejected", "judge", "no"))
    found = forecast(spending.site, night.state, spending, night._now, proposals=0)
    assert (found["ends"], found["experiments"]) == (LAST, 12 + 9 + 9 + 9 + 2)  # two of the final number
    assert found["basis"] == "rough" and found["off"]["experiments"] > 0.3


@pytest.mark.parametrize("what", ["usd", "tokens"])
def test_what_lies_in_stock_is_not_paid_for_again(tmp_path: Path, what: str) -> None:
    """Where money ends the night; where time does, as many candidates are left over as lie there now."""
    per = 0.5 if what == "usd" else 100
    for pending in (0, 4):
        night, spending = opened(tmp_path / str(pending), pending, 1, "llm", **{what: 40 * per})
        train(night, 0, 100)
        for number in range(1, 21):
            train(night, number, 100)
            ask(night, number, 0.5, 100)
            night.ledger.append("verdict", Verdict(f"{number:03d}-x", "rejected", "judge", "no"))
            night._now += datetime.timedelta(seconds=100)
        for number in range(21, 25):
            ask(night, number, 0.5, 100)  # on the shelf
        found = forecast(spending.site, night.state, spending, night._now)
        assert found["ends"] == {"usd": "dollars"}.get(what, what)
        assert 38.9 * per <= found[what] <= 40 * per, (pending, found)


def marks_of(tried: list[tuple[int, int]]) -> list[Mark]:
    """Marks of candidates that took so many experiments of 10 s and so many tokens each."""
    found = [Mark(0, 0.0, 0.0, 0, 0.0)]
    for experiments, tokens in tried:
        last = found[-1]
        found.append(Mark(last.experiments + experiments, last.held + 10 * experiments, 0.0, last.tokens + tokens,
                          last.worked + 10 * experiments))
    return found


def test_the_range_of_a_forecast_holds_what_is_spent_19_times_in_20() -> None:
    """Of simulated campaigns in which one candidate in seven takes 17 experiments instead of one, ended by tokens, by
    experiments or with their proposals, at half of the night."""
    dice, widths = random.Random(0), list[float]()
    held = {"tokens": 0, "experiments": 0, LAST: 0}
    for number in range(900):
        ends = ("tokens", "experiments", LAST)[number % 3]
        tried = [(17 if dice.random() < 1 / 7 else 1, dice.randrange(50, 150)) for _ in range(160)]
        half = marks_of(tried[:80])
        each = {"experiments": half[-1].experiments / 80, "tokens": half[-1].tokens / 80}
        room = 80 * each.get(ends, 1)  # what is left of that which ends it
        more = 80 * each["experiments"]
        totals = {"experiments": 160 * each["experiments"], "tokens": 160 * each["tokens"]}
        off = scatter(half, ends, totals, more, 0.0)
        spent = [half[-1].experiments, half[-1].tokens]
        left = room
        while left > 0:
            runs_, tokens = (17 if dice.random() < 1 / 7 else 1, dice.randrange(50, 150))
            left -= {"tokens": tokens, "experiments": runs_}.get(ends, 1)
            spent = [spent[0] + runs_, spent[1] + tokens]
        other = "tokens" if ends == "experiments" else "experiments"
        true = spent[0] if other == "experiments" else spent[1]
        held[ends] += abs(totals[other] - true) <= off[other] * totals[other]
        widths.append(off[other])
    assert all(0.92 <= share / 300 <= 0.995 for share in held.values()), held
    assert 0.15 < statistics.median(widths) < 0.5


def test_candidates_that_are_alike_leave_a_range_of_one_and_a_certification_yet_to_come_widens_it() -> None:
    marks = marks_of([(1, 100)] * 20)
    totals = {"experiments": 40.0, "tokens": 4000.0}
    assert scatter(marks, "experiments", totals, 20.0, 0.0) == pytest.approx({"experiments": 1 / 40, "tokens": 1 / 40})
    wide = scatter(marks, "experiments", totals, 20.0, 0.0, unseen=16)  # 3 of 20 would take 16 each
    assert wide["tokens"] == pytest.approx(1 / 40 + 20 * 3 / 20 * 16 / 40) and wide["experiments"] == 1 / 40
    assert scatter(marks[:9], "tokens", totals, 20.0, 0.0) and not scatter(marks[:8], "tokens", totals, 20.0, 0.0)


@pytest.mark.parametrize(("text", "wanted"), [("usd=5", 5.0), ("tokens=1e6", 1_000_000), ("gpu_hours=0", 0.0)])
def test_a_cap_of_the_command_line_lies_over_the_file(text: str, wanted: float) -> None:
    laid = parse_caps((text,), Caps(usd=1, tokens=2, gpu_hours=3))
    assert getattr(laid, text.split("=")[0]) == wanted


@pytest.mark.parametrize("text", ["usd", "usd=-1", "dollars=3", "usd=nan", "usd=inf"])
def test_a_cap_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--cap"):
        parse_caps((text,), Caps())


def test_prices_come_from_the_config_then_the_table_and_unknown_ones_are_flagged() -> None:
    known_ = prices.find(Model(), "gpt-4o", "https://api.openai.com/v1")
    assert known_.known and known_.prompt > 0 and known_.completion > known_.prompt and "https://" in known_.source
    assert known_.usd(1_000_000, 0) == pytest.approx(known_.prompt)
    own = prices.find(Model(usd_per_million_prompt=1, usd_per_million_completion=2), "gpt-4o", "https://x.example/v1")
    assert (own.prompt, own.completion, own.source) == (1, 2, "ratchet.toml")
    local = prices.find(Model(), "gpt-4o", "http://192.168.1.7:8000/v1")
    assert local.known and local.usd(10**9, 10**9) == 0
    unknown = prices.find(Model(), "no-such-model", "https://x.example/v1")
    assert not unknown.known and "not known" in prices.line(unknown, "no-such-model")
    with pytest.raises(UserError, match="price of no-such-model is not known"):
        prices.check_cap(unknown, "no-such-model", 5.0)
    prices.check_cap(unknown, "no-such-model", 0.0)


@pytest.mark.parametrize(("now", "until", "wanted"), [
    ("2026-03-28T23:30:00+01:00", "07:00", "2026-03-29T07:00:00+02:00"),  # clocks go forward that night
    ("2026-10-24T23:30:00+02:00", "07:00", "2026-10-25T07:00:00+01:00"),  # and back
    ("2026-06-01T23:30:00+02:00", "07:00", "2026-06-02T07:00:00+02:00"),
    ("2026-06-01T06:30:00+02:00", "7:00", "2026-06-01T07:00:00+02:00"),
    ("2026-03-29T00:30:00+01:00", "02:30", "2026-03-29T01:30:00+01:00"),  # a time that there is not: early
])
def test_until_is_what_the_clock_on_the_wall_shows(now: str, until: str, wanted: str) -> None:
    code = ("import datetime, sys, time; time.tzset(); from agent.site import until_time; "
            "print(until_time(sys.argv[2], datetime.datetime.fromisoformat(sys.argv[1])).isoformat())")
    done = subprocess.run([sys.executable, "-c", code, now, until], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent, env=os.environ | {"TZ": "CET-1CEST,M3.5.0,M10.5.0/3"})
    assert done.stdout.strip() == wanted
    assert until_time(None, NOW) is None


def test_a_campaign_says_what_it_expects_and_keeps_its_caps_over_a_restart(tmp_path: Path) -> None:
    from agent import tiny
    tiny.write_tiny_target(tmp_path / "target", served=False)
    with serving(one_then_end) as (_, variables):  # type: ignore[arg-type]
        done = ratchet("run", "target", "--name", "n", "--cap", "experiments=40", "--cap", "usd=3", cwd=tmp_path,
                       model=variables)
    assert done.returncode == 0, done.stderr
    shown = json.loads(ratchet("status", "--json", cwd=tmp_path).stdout)
    assert shown["forecast"]["basis"] in ("baseline", "rough", "calibrated") and shown["forecast"]["usd_at_most"] == 3
    assert "forecast  about" in ratchet("status", cwd=tmp_path).stdout
    first = json.loads((tmp_path / "runs" / "n" / "ledger.jsonl").read_text().splitlines()[0])
    assert first["data"]["caps"]["experiments"] == 40 and first["data"]["caps"]["usd"] == 3


@pytest.mark.parametrize("campaigns", [1, pytest.param(12, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_random_campaigns_keep_their_caps(tmp_path: Path, campaigns: int) -> None:
    done = ratchet_long("bench", "caps", "--json", "--campaigns", str(campaigns), "--experiments", "40", cwd=tmp_path)
    facts: dict[str, Any] = json.loads(done.stdout)
    assert facts["campaigns"] == campaigns and facts["caps_broken"] == 0
    assert all(value <= 1 for value in facts["over_at_most"].values())
    assert all(any(forecast["off"] for forecast in one["forecasts"]) for one in facts["each"])


def ratchet_long(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agent.cli", *arguments], cwd=cwd, env=environment(), text=True,
                          capture_output=True, timeout=880)
