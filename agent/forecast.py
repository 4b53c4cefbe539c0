"""What a campaign will have spent at its end: from its caps and its prices before the first run, from what its own runs
and replies took afterwards.

    experiments = those that the tightest cap leaves room for, and those of the final number
    the rest    = what is spent + further experiments x what one has taken so far

The tightest of these ends it: experiments, wall time, GPU-hours, dollars, tokens, disk, and the list of proposals where
it has an end (the idea book, the user's patches). If there is none of them, the forecast is of an hour. What one
experiment takes counts all that goes with it: tiny runs, audits, replies, waiting. Before the first run it is taken
from the limits: the budget in seconds, else what a run of the last campaign took, else the wall limit of a run (then
the forecast is of the fewest experiments). The runs of the final number are made only if something is merged: half of
them are counted until something is.

How far off it may be is told by how much candidates differ (``scatter``): where one in ten is certified, in sixteen
runs instead of one, nobody can tell from ten of them what thirty more will take. A forecast counts as calibrated once
the widest of its ranges is 15 %, so that few nights in a hundred are off by a fifth; until then it is ``rough``. It is
written to the ledger before the first run, after the baseline, once ``ROUGH`` attempts have a verdict, again whenever
there are half as many more, and when it is calibrated; `ratchet bench caps` holds it against what is spent.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from agent.config import endpoint
from agent.intake import Intake
from agent.ledger import Attempt, Ledger, Mark, State, seconds_between
from agent.llm import prices
from agent.propose import MODELS
from agent.show.screen import Observer
from agent.show.view import HOUR, forecast_line
from agent.site import Site
from agent.spending import REPORT, Spending

ROUGH = 10
"""Attempts with a verdict from which a forecast rests on what candidates took."""
WITHIN = 0.2
"""What a calibrated forecast promises to be off by at most, as a share of the whole."""
CALIBRATED = 0.15
"""Half the 95 % range, as a share of the whole, at which a forecast counts as calibrated. At ``WITHIN`` itself one
night in fifty was off by more, since a range of eight parts is uncertain too."""
OFTEN = 1.02
"""Verdicts, as a multiple of those before, after which it is asked again whether the forecast is calibrated by now."""
BLOCKS, QUANTILE = 8, 2.365
"""Parts into which the candidates so far are cut, and the 97.5 % quantile of Student's t for them."""
BATCH = 2
"""Fewest candidates of a part in a forecast that counts as calibrated. With one it says nothing of how neighbours are
alike: a range of 5 % after 11 verdicts was off by 41 %."""
RUNS_A_CANDIDATE = 2.0
"""Before it is known: one on the screening seed and some share of a certification."""
CHARACTERS_A_TOKEN = 3.5
LAST = "the last proposal"
"""What a forecast says that ends a campaign whose list of proposals is shorter than its caps allow."""


class Night(Protocol):
    """What a forecast needs of a campaign."""

    site: Site
    ledger: Ledger
    spending: Spending
    observer: Observer
    intake: Intake

    @property
    def state(self) -> State: ...


class Forecaster:
    """Writes the forecasts of one campaign as they fall due."""

    def __init__(self, night: Night, before: float = 0.0) -> None:
        """``before``: seconds of a run in the last campaign on this target; 0 if there was none."""
        self._night, self._before = night, before
        self._weighed = 0
        """Verdicts when it was last asked whether the forecast is calibrated by now."""

    def look(self, now: datetime.datetime) -> None:
        """Write a forecast if one is due."""
        state = self._night.state
        told, judged = state.forecasts, len(state.judged)
        known = {one["basis"] for one in told}
        rough = judged >= ROUGH and state.trained > 0
        if not told:
            due = True
        elif rough:
            due = judged >= 1.5 * max(told[-1]["judged"], ROUGH / 1.5)
        else:
            due = bool(state.longest) and known == {"limits"}
        hopes = rough and "calibrated" not in known and judged > OFTEN * self._weighed
        if not due and not hopes:
            return
        if not told and state.campaign.get("proposer") in MODELS:
            self._tell_price()
        self._weighed = judged
        found = forecast(self._night.site, state, self._night.spending, now, self._before, self._night.intake.left())
        if not due and found["basis"] != "calibrated":
            return
        self._night.ledger.append("forecast", found)
        say = self._night.observer.note if found["basis"] not in known else self._night.observer.phase
        say(f"forecast: {forecast_line(found)}")

    def _tell_price(self) -> None:
        """Say what the model costs. Raises UserError where a cap in dollars cannot hold."""
        model = self._night.site.config.model
        base, name = endpoint(model)
        price = prices.find(model, name, base)
        prices.check_cap(price, name, self._night.spending.caps.usd)
        self._night.observer.note(prices.line(price, name))


def forecast(site: Site, state: State, spending: Spending, now: datetime.datetime,
             before: float = 0.0, proposals: int | None = None) -> dict[str, Any]:
    """The totals of the whole campaign, as data of a ``forecast`` event: experiments, gpu_hours, usd, tokens, hours,
    disk_gb, what ends it, what it is based on (limits, baseline, rough, calibrated), and ``off``: half the 95 % range
    of each total as a share of it, once that is known. ``proposals``: those still to come, if it is
    known how many."""
    caps, done = spending.caps, state.trained - sum(run.trains for run in state.open_runs)
    judged = len(state.judged)
    rough = judged >= ROUGH and done > 0
    basis = "rough" if rough else "baseline" if state.longest else "limits"
    slots = len(site.devices)
    worked = state.worked + (seconds_between(state.session, now.isoformat()) if state.session else 0.0)
    seconds = (state.held / done if done else 0.0) or _expected(site, before)
    wall = seconds / slots
    first = next((one for one in state.forecasts if one["basis"] == "baseline"), None)
    if rough:
        seconds = _closed_seconds(state, done) or seconds
    disk, disk_each = spending.disk, 0.0
    if rough and first is not None and done > first["done"]:  # what came before happens once
        if worked > first["worked"]:  # or the clock went back
            wall = (worked - first["worked"]) / (done - first["done"])
        disk_each = max(0.0, disk - first.get("disk", disk)) / (done - first["done"])  # .get: older ledgers have none
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
    if caps.disk_gb and disk_each:
        room["disk"] = (caps.disk_gb * 1e9 - REPORT - disk) / disk_each - back - 1
    if proposals is not None:
        room[LAST] = _takes(list(state.attempts.values()), state, done, judged, proposals)[1]
    ends = min(room, key=lambda name: room[name]) if room else HOUR
    more = max(0.0, min(room.values()) if room else 3600 / wall)
    # where money ends the night, candidates in stock are tried after the last question; else as many are left over
    asking = max(0.0, more - stock) if ends in ("dollars", "tokens") else more
    finals = 2 * site.config.judge.final_pairs
    if spending.budget_runs is not None:
        finals = min(finals, spending.budget_runs // 3 // 2 * 2)
    finals = finals if state.kept else finals // 2
    totals = {"experiments": done + more + finals, "gpu_hours": (state.held + more * seconds + finals * longest) / 3600,
              "usd": (spent_usd + asking * dollars
                      + (more * seconds + finals * longest) / 3600 * caps.usd_per_gpu_hour),
              "tokens": spent_tokens + asking * (prompt + reply),
              "hours": (worked + more * wall + finals * longest / slots) / 3600}
    certified = any(state.attempts[one.candidate].verdict for one in state.certifications)
    unseen = 0 if certified else 2 * max(site.config.judge.looks)
    off = scatter(state.marks, ends, totals, more, caps.usd_per_gpu_hour, unseen) if rough else {}
    if off and max(off.values()) <= CALIBRATED and len(state.marks) > BATCH * BLOCKS:
        basis = "calibrated"
    return {"basis": basis, "ends": ends, "experiments": round(totals["experiments"]),
            "gpu_hours": round(totals["gpu_hours"] * site.config.train.gpus_per_run, 6),
            "usd": round(totals["usd"], 6), "usd_at_most": caps.usd or None, "tokens": round(totals["tokens"]),
            "hours": round(totals["hours"], 6), "disk_gb": round((disk + (more + finals) * disk_each) / 1e9, 6),
            "off": {name: round(value, 4) for name, value in off.items()},
            "seconds_a_run": round(seconds, 3), "reserved_runs": back,
            "judged": judged, "done": done, "held": state.held, "worked": worked, "disk": disk}


def scatter(marks: Sequence[Mark], ends: str, totals: Mapping[str, float], more: float,
            usd_per_gpu_hour: float, unseen: int = 0) -> dict[str, float]:
    """Half the 95 % range of each of ``totals`` as a share of it; empty while there are too few verdicts.

    ``more`` experiments are to come, until what ``ends`` the campaign is spent. Per candidate let y be what is forecast
    and x what ends it, with means Y and X over the n candidates so far. What is left of x pays for N more, so the error
    of the total of y is that of N candidates to come and of the mean's own:

        se = sd(y - Y/X x) sqrt(N + N^2 / n)        (a ratio estimator: Cochran, Sampling Techniques, 3rd ed., 6.4)

    with the long-run sd by batch means over ``BLOCKS`` parts in order, since neighbours are alike (candidates are
    screened, then certified, together), and Student's t for as many; and one candidate, as the end may lie anywhere in
    its runs. ``unseen``: runs of a certification, where none has ended yet: what was not seen in n candidates happens
    to fewer than 3 in n, at 95 % (Hanley and Lippman-Hand 1983).
    """
    n = len(marks) - 1
    if n < BLOCKS:
        return {}
    ending = {"wall time": "hours", HOUR: "hours", "GPU-hours": "gpu_hours", "dollars": "usd"}.get(ends, ends)
    ending = ending if ending in (*totals, LAST) else "experiments"  # the disk fills with them
    cuts = [round(part * n / BLOCKS) for part in range(BLOCKS + 1)]
    table = {cut: {"experiments": float(one.experiments), "gpu_hours": one.held / 3600,
                   "usd": one.usd + one.held / 3600 * usd_per_gpu_hour, "tokens": float(one.tokens),
                   "hours": one.worked / 3600, LAST: float(cut)} for cut in cuts for one in (marks[cut],)}
    mean = {name: (table[n][name] - table[0][name]) / n for name in (*totals, LAST)}
    if mean[ending] <= 0 or mean["experiments"] <= 0:
        return {}
    further = more / mean["experiments"]
    found = {}
    for name, total in totals.items():
        if total <= 0 or mean[name] <= 0:
            continue
        ratio = mean[name] / mean[ending]
        rest = [(table[end][name] - table[begin][name] - ratio * (table[end][ending] - table[begin][ending]))
                / math.sqrt(end - begin) for begin, end in itertools.pairwise(cuts)]
        spread = math.sqrt(sum(value**2 for value in rest) / (BLOCKS - 1))
        found[name] = (mean[name] + QUANTILE * spread * math.sqrt(further + further**2 / n)) / total
        if name != ending:
            found[name] += further * 3 / n * unseen / totals["experiments"]
    return found


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
        each, stock = _takes(asked, state, done, judged, pending)
        share = 1 / each / len(asked)
        return (state.paid.prompt_tokens * share, state.paid.completion_tokens * share, state.paid.usd * share, stock)
    editable, protected = site.texts(state.tip)
    prompt = sum(map(len, (*editable.values(), *protected.values()))) / CHARACTERS_A_TOKEN / RUNS_A_CANDIDATE
    reply = site.config.model.max_tokens / RUNS_A_CANDIDATE
    base, name = endpoint(site.config.model)
    return prompt, reply, prices.find(site.config.model, name, base).usd(round(prompt), round(reply)), 0.0


def _takes(attempts: Sequence[Attempt], state: State, done: int, judged: int, further: int) -> tuple[float, float]:
    """(experiments for each of ``attempts``, those that the open ones among them and ``further`` ones ask for).

    An open one that has had b runs is expected to ask for as many more as closed ones of more than b did on average
    (the mean residual life): one that is being certified has most of its runs before it.
    """
    closed = [sum(run.trains for run in one.runs) for one in attempts if one.verdict is not None]
    begun = [sum(run.trains for run in one.runs) for one in attempts if one.verdict is None]
    tried = done - sum(begun) - (state.upfront or 0)
    known = judged >= ROUGH and closed and tried > 0
    each = tried / len(closed) if known else RUNS_A_CANDIDATE
    beside = tried / sum(closed) if known and sum(closed) else 1.0  # with the incumbents' runs
    to_come = 0.0
    for runs in begun:
        longer = [total - runs for total in closed if total > runs] if runs and known else []
        to_come += beside * sum(longer) / len(longer) if longer else max(0.0, each - runs)
    return each, to_come + further * each
