"""What a campaign will have spent at its end: from its caps and its prices before the first run, from what its own runs
and replies took afterwards.

    experiments = those that the tightest cap leaves room for, and those of the final number
    the rest    = what is spent + further experiments x what one has taken so far

The tightest of these ends it: experiments, wall time, GPU-hours, dollars, tokens; if none is set, nobody knows when the
proposals run out, and the forecast is of an hour. What one experiment takes counts all that goes with it: tiny runs,
audits, replies, waiting. Before the first run it is taken from the limits: the budget in seconds, else what a run of
the last campaign took, else the wall limit of a run (then the forecast is of the fewest experiments). The runs of the
final number are made only if something is merged: half of them are counted until something is.

It is written to the ledger before the first run, after the baseline, once ``CALIBRATED`` attempts have a verdict, and
again whenever there are half as many more; `ratchet bench caps` holds it against what is spent. Disk is not forecast.
"""

from __future__ import annotations

import datetime
from typing import Any, Protocol

from agent import prices
from agent.config import endpoint
from agent.ledger import Ledger, State, seconds_between
from agent.propose import MODELS
from agent.screen import Observer
from agent.site import Site
from agent.spending import Spending
from agent.view import HOUR, forecast_line

CALIBRATED = 10
"""Attempts with a verdict from which a forecast counts as calibrated."""
RUNS_A_CANDIDATE = 2.0
"""Before it is known: one on the screening seed and some share of a certification."""
CHARACTERS_A_TOKEN = 3.5


class Night(Protocol):
    """What a forecast needs of a campaign."""

    site: Site
    ledger: Ledger
    spending: Spending
    observer: Observer

    @property
    def state(self) -> State: ...


class Forecaster:
    """Writes the forecasts of one campaign as they fall due."""

    def __init__(self, night: Night, before: float = 0.0) -> None:
        """``before``: seconds of a run in the last campaign on this target; 0 if there was none."""
        self._night, self._before = night, before

    def look(self, now: datetime.datetime) -> None:
        """Write a forecast if one is due."""
        state, known = self._night.state, {one["basis"] for one in self._night.state.forecasts}
        basis = "calibrated" if len(state.judged) >= CALIBRATED and state.trained else (
            "baseline" if state.longest else "limits")
        last = max((one["judged"] for one in state.forecasts), default=0)
        again = basis == "calibrated" and len(state.judged) >= 1.5 * max(last, CALIBRATED)
        if (basis in known and not again) or (known and basis == "limits"):
            return
        if not known and state.campaign.get("proposer") in MODELS:
            self._tell_price()
        found = forecast(self._night.site, state, self._night.spending, now, self._before)
        self._night.ledger.append("forecast", found)
        say = self._night.observer.note if basis not in known else self._night.observer.phase
        say(f"forecast: {forecast_line(found)}")

    def _tell_price(self) -> None:
        """Say what the model costs. Raises UserError where a cap in dollars cannot hold."""
        model = self._night.site.config.model
        base, name = endpoint(model)
        price = prices.find(model, name, base)
        prices.check_cap(price, name, self._night.spending.caps.usd)
        self._night.observer.note(prices.line(price, name))


def forecast(site: Site, state: State, spending: Spending, now: datetime.datetime,
             before: float = 0.0) -> dict[str, Any]:
    """The totals of the whole campaign, as data of a ``forecast`` event: experiments, gpu_hours, usd, tokens, hours,
    what ends it, and what it is based on (limits, baseline, calibrated)."""
    caps, done = spending.caps, state.trained - len(_open(state))
    judged = len(state.judged)
    calibrated = judged >= CALIBRATED and done > 0
    basis = "calibrated" if calibrated else "baseline" if state.longest else "limits"
    slots = len(site.devices)
    worked = state.worked + (seconds_between(state.session, now.isoformat()) if state.session else 0.0)
    seconds = state.held / done if done else _expected(site, before)
    wall = seconds / slots
    first = next((one for one in state.forecasts if one["basis"] == "baseline"), None)
    if calibrated:
        seconds = _closed_seconds(state, done)
    if calibrated and first is not None and done > first["done"]:  # what came before happens once
        wall = (worked - first["worked"]) / (done - first["done"])
    prompt, reply, dollars, stock = _reply(site, state, done, judged, spending.pending)
    usd = dollars + seconds / 3600 * caps.usd_per_gpu_hour
    spent_usd = state.paid.usd + state.held / 3600 * caps.usd_per_gpu_hour
    spent_tokens = state.paid.prompt_tokens + state.paid.completion_tokens
    longest, back = state.longest or seconds, spending.reserved(spending.budget_runs)
    room = {}
    if spending.budget_runs is not None:
        room["experiments"] = float(spending.budget_runs - back - done)
    end = spending.deadline
    if end is not None:
        left = (end - now).total_seconds() - longest * spending.rounds(back)
        room["wall time"] = left / wall
    if caps.gpu_hours:
        room["GPU-hours"] = (caps.gpu_hours * 3600 - state.held - back * longest) / seconds
    if caps.usd and usd:
        room["dollars"] = (caps.usd - spent_usd - back * longest / 3600 * caps.usd_per_gpu_hour
                           - state.dearest.usd - seconds / 3600 * caps.usd_per_gpu_hour * stock) / usd + stock
    if caps.tokens and prompt + reply:
        dearest = state.dearest.prompt_tokens + state.dearest.completion_tokens
        room["tokens"] = (caps.tokens - spent_tokens - dearest) / (prompt + reply) + stock
    ends = min(room, key=lambda name: room[name]) if room else HOUR
    more = max(0.0, min(room.values(), default=3600 / wall))
    finals = 2 * site.config.judge.final_pairs
    if spending.budget_runs is not None:
        finals = min(finals, spending.budget_runs // 3 // 2 * 2)
    finals = finals if state.kept else finals // 2
    tokens = spent_tokens + more * (prompt + reply)
    total = spent_usd + more * usd + finals * longest / 3600 * caps.usd_per_gpu_hour
    return {"basis": basis, "ends": ends, "experiments": round(done + more + finals),
            "gpu_hours": round(
                (state.held + more * seconds + finals * longest) / 3600 * site.config.train.gpus_per_run, 6),
            "usd": round(total, 6), "usd_at_most": caps.usd or None, "tokens": round(tokens),
            "hours": round((worked + more * wall + finals * longest / slots) / 3600, 6),
            "seconds_a_run": round(seconds, 3), "reserved_runs": back,
            "judged": judged, "done": done, "held": state.held, "worked": worked}


def _open(state: State) -> list[str]:
    """Training runs that have no result yet."""
    return [name for name, run in state.runs.items() if run.trains and name not in state.results]


def _closed_seconds(state: State, done: int) -> float:
    """Seconds on slots for each experiment, tiny runs and audits included, without what belongs to attempts in work:
    their tiny runs are ahead of their experiments."""
    open_ = [run for attempt in state.attempts.values() if attempt.verdict is None for run in attempt.runs
             if run.id in state.results]
    held = state.held - sum(state.results[run.id].seconds for run in open_)
    return held / max(1, done - sum(run.trains for run in open_))


def _expected(site: Site, before: float) -> float:
    """Seconds of a run before the first one."""
    budget = site.config.budget
    if budget.unit == "seconds" and budget.amount:
        return budget.amount
    return before or site.config.limits.wall_seconds


def _reply(site: Site, state: State, done: int, judged: int, pending: int) -> tuple[float, float, float, float]:
    """(prompt tokens, completion tokens, dollars) of the model for each experiment, and the experiments that
    candidates which are paid for already, or on their way, still ask for."""
    if state.campaign.get("proposer") not in MODELS:
        return 0.0, 0.0, 0.0, 0.0
    asked = [attempt for attempt in state.attempts.values() if attempt.proposal.cost.calls]
    if asked:
        open_ = [attempt for attempt in asked if attempt.verdict is None]
        begun = sum(run.trains for attempt in open_ for run in attempt.runs)
        closed = len(asked) - len(open_)
        each = (done - begun) / closed if judged >= CALIBRATED and closed and done > begun else RUNS_A_CANDIDATE
        share = 1 / each / len(asked)
        return (state.paid.prompt_tokens * share, state.paid.completion_tokens * share, state.paid.usd * share,
                max(0.0, (len(open_) + pending) * each - begun))
    editable, protected = site.texts(state.tip)
    prompt = sum(map(len, (*editable.values(), *protected.values()))) / CHARACTERS_A_TOKEN / RUNS_A_CANDIDATE
    reply = site.config.model.max_tokens / RUNS_A_CANDIDATE
    base, name = endpoint(site.config.model)
    return prompt, reply, prices.find(site.config.model, name, base).usd(round(prompt), round(reply)), 0.0
