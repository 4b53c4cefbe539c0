"""Opening a campaign: a new one, the unfinished one again, or the next one from a finished one's tip."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import (
    __version__,
    calls,
    engines,
    git,
    proposers,
    queue_patches,
    recovery,
    resources,
    runs,
    search,
    site,
    spending,
)
from agent.config import Caps, Config, other_models
from agent.errors import UserError
from agent.ideas import packaged_ideas
from agent.ledger import Clock, Ledger, State, replay
from agent.llm import minds
from agent.llm.news import News
from agent.propose import MODELS, Proposer
from agent.show.screen import Observer
from agent.site import Origin, Site
from sandbox import box, gpu
from sandbox.engine import Engine
from sandbox.view import interpreter_roots

OWN = {"lock", "ledger.jsonl", "repo.git", "source", "jobs", "night.log", "orders.jsonl"}
"""What may lie in the folder of a run that was never opened to its end."""


FINITE = ("ideas", "queue")
"""Proposers whose list ends."""
BUNDLES_FROM = 100
"""Training runs of a campaign from which on bundles find more than certifying one by one: docs/LOG.md."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for on the command line."""

    repo: Path | None
    """None: the target that comes with ratchet."""
    preset: str = ""
    name: str = ""
    proposer: str = ""
    """"", "hybrid", "llm", "search", "random", "ideas" or "queue"."""
    patches: tuple[Path, ...] = ()
    budget_runs: int | None = None
    until: str | None = None
    seed: int = 0
    slots: int | None = None
    max_level: int = 3
    unconfined: bool = False
    """Consent to run code that nobody has read without a box, where the level is 0."""
    fresh: bool = False
    """A new run from the target's newest commit, whatever earlier runs merged or left unfinished."""
    runs: Path = Path("runs")
    engine: str = ""
    """"", "local", "ray" or "slurm"."""
    caps: tuple[str, ...] = ()
    """``NAME=VALUE``, laid over [caps] of the config."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An open campaign: its fixed facts, its memory, where its ideas come from, and what runs its jobs."""

    site: Site
    ledger: Ledger
    proposer: Proposer
    until: datetime.datetime | None
    budget_runs: int | None
    engine: Engine
    news: News = field(default_factory=News)
    """What the proposer's threads have to say."""

    def close(self) -> None:
        """Let the proposer's threads end; give back the engine's machines, and the ledger."""
        self.news.over.set()
        self.engine.close()
        self.ledger.close()


def choose_folder(options: Options, clock: Clock) -> tuple[Path, Path | None]:
    """(the campaign's folder, the finished campaign it goes on from or None). Raises UserError for a taken name."""
    folder_of_runs = options.runs.resolve()
    target = str(_target(options).resolve())
    kind = "queue" if options.proposer == "queue" else "run"
    named = folder_of_runs / runs.check_name(options.name) if options.name else None
    if named is not None and (named / "ledger.jsonl").exists():
        if options.fresh:
            raise UserError(f"There is a run {options.name} already.", "Choose another --name, or leave out --fresh.")
        state, _ = replay(named / "ledger.jsonl")
        if state.phase == "finished":
            raise UserError(f"Run {options.name} is finished.",
                            "Leave out --name: the next run goes on from its accepted tip.")
        if state.campaign and state.campaign["target"] != target:
            raise UserError(f"Run {options.name} is on another target ({state.campaign['target']}).",
                            "Choose another --name.")
        if _failed_at_start(state):
            raise UserError(f"Run {options.name} ended because its target itself fails to train.",
                            "Mend the target, commit, and choose another --name.")
        return named, None
    if named is not None and named.is_dir() and {path.name for path in named.iterdir()} - OWN:
        raise UserError(f"{named} holds files that are no run's.", "Choose another --name.")
    known = runs.names(folder_of_runs)
    fresh = named or folder_of_runs / runs.new_name(set(known), clock)
    for name in reversed([] if named or options.fresh else known):
        state, _ = replay(folder_of_runs / name / "ledger.jsonl")
        if state.campaign.get("target") != target:
            continue
        same_kind = ("queue" if state.campaign["proposer"] == "queue" else "run") == kind
        if state.phase == "finished":  # its tip may be that of a run before it
            return fresh, folder_of_runs / name if state.tip != state.campaign["origin"] else None
        if same_kind and _same_wish(options, state) and not _failed_at_start(state):
            return folder_of_runs / name, None
    return fresh, None


def open_campaign(options: Options, folder: Path, continued: Path | None, observer: Observer, clock: Clock) -> Opened:
    """Open ``folder``: go on where its ledger stops, or start it. Raises UserError for what the user must mend."""
    until, budget_runs = site.until_time(options.until, clock()), options.budget_runs
    for root in (Path("/usr"), *interpreter_roots()):
        if folder.resolve().is_relative_to(root):
            raise UserError(f"{folder} lies under {root}, which every box can read.", "Give a --runs folder elsewhere.")
    ledger = Ledger(folder / "ledger.jsonl", clock)
    begun = bool(ledger.state.campaign)
    if not begun:
        for left in ("repo.git", "source", "jobs"):  # of a process that was killed while it opened the run
            shutil.rmtree(folder / left, ignore_errors=True)
    with contextlib.ExitStack() as on_failure:
        place, facts, engine = (_reopen(options, folder, ledger.state, observer, on_failure) if begun else
                                _start(options, folder, continued, observer, on_failure))
        facts |= recovery.mend(folder, ledger.state, observer.note)
        if begun:
            observer.note(f"going on with run {folder.name}: {len(ledger.state.attempts)} attempts, "
                          f"{len(ledger.state.merges)} merged so far")
            until, budget_runs = _limits(ledger.state, until, budget_runs, clock(), observer)
        begun_with = Caps.model_validate(facts["caps"]) if facts.get("caps") else place.config.caps
        caps = spending.parse_caps(options.caps, begun_with)
        place = dataclasses.replace(place, config=place.config.model_copy(update={"caps": caps}))
        level, unread = _level(engine, place), _unread(options, place, ledger.state, facts)
        follows = _search_follows(options, place, level, bool(
            budget_runs or until or caps.hours or caps.gpu_hours or caps.experiments), facts)
        unread = unread or follows
        unconfined = options.unconfined or bool(facts.get("unconfined"))
        _check_box(level, unread and not unconfined, None if engine.remote else folder)
        place = dataclasses.replace(place, least_level=int(unread and not unconfined))
        ledger.append("started", facts | {
            "level": level, "unread": unread, "unconfined": unconfined, "engine": engine.kind,
            "devices": list(place.devices), "slots": len(place.devices),
            "budget_runs": budget_runs, "caps": caps.model_dump(), "until": until.isoformat() if until else ""})
        news = News()
        opened = Opened(place, ledger, _proposer(options, place, ledger.state, observer, news, follows), until,
                        budget_runs, engine.runner, news)
        on_failure.pop_all()
    return opened


def _level(engine: engines.Opening, place: Site) -> int | None:
    """The level that jobs will have; None where only the node that a job gets can say it, and refuses by itself."""
    return engine.remote.level if engine.remote else int(box.probe(place.level))


def _search_follows(options: Options, place: Site, level: int | None, bounded: bool, facts: dict[str, Any]) -> bool:
    """Whether the optimiser goes on where the idea book ends: nobody chose a proposer, the owner bounded the night
    (else it would grow longer), and there is a box, since a moved constant is code that nobody has read."""
    return (bounded and not options.proposer and facts["proposer"] != "queue" and level != box.Level.PLAIN
            and proposers.choose("auto", place.config.model).kind == "ideas")


def _unread(options: Options, place: Site, state: State, facts: dict[str, Any]) -> bool:
    """Whether the campaign runs code that nobody has read: all but the idea cards, which come with ratchet.

    What an earlier campaign merged on the way to this one's start counts, and so does what this one has begun.
    """
    if facts["proposer"] == "queue" or proposers.choose(_wanted(options), place.config.model).kind != "ideas":
        return True
    return bool(facts.get("unread", facts["proposer"] != "ideas")) or any(
        attempt.proposal.author != "ideas" for attempt in state.attempts.values())


def _check_box(level: int | None, refuse: bool, folder: Path | None) -> None:
    """Raises UserError where there is no box for code that needs one, or the box could not reach its files (in
    ``folder``, if it lies on the machine that runs the jobs)."""
    if level == box.Level.PLAIN and refuse:
        raise UserError("At isolation level 0 a patch can read and change your files and use the network, so only the "
                        "idea cards that come with ratchet are run.", "`ratchet doctor` says how to reach a higher "
                        "level; --unconfined runs the patches all the same.")
    closed = box.out_of_reach(folder) if folder and level == box.Level.LANDLOCK else None
    if closed is not None:
        raise UserError(f"The user id that a job gets may not enter {closed}.", "Give a --runs folder that others may "
                        "enter, for instance below /var/tmp.")


def reopen_finished(options: Options, folder: Path, state: State, unread: bool, observer: Observer,
                    at_end: contextlib.ExitStack) -> tuple[Site, Engine]:
    """The fixed facts of a finished campaign and its engine, which ``at_end`` closes, to train more in its folder.

    ``unread``: its accepted branch holds code that nobody has read. Raises UserError as a campaign does.
    """
    place, _, engine = _reopen(options, folder, state, observer, at_end, moved=True)
    refuse = (unread or bool(state.campaign.get("unread", state.campaign["proposer"] != "ideas"))) and not (
        options.unconfined or bool(state.campaign.get("unconfined")))
    _check_box(_level(engine, place), refuse, None if engine.remote else folder)
    return dataclasses.replace(place, least_level=int(refuse)), engine.runner


def moved_branch(state: State, repo: Path) -> UserError | None:
    """What to say where the accepted branch is not where the ledger says; None where it is."""
    pending = state.pending_merge or state.pending_removal or state.pending_revert
    known = {state.tip, *((pending.old_tip, pending.new_tip) if pending else ())}
    found = git.resolve(repo, git.ACCEPTED)
    if found is None or found in known:
        return None
    return UserError(
        f"The accepted branch is at {found[:12]}, but the ledger says {state.tip[:12]}: somebody moved it by hand.",
        f"Move it back:  git --git-dir {repo} update-ref {git.ACCEPTED} {state.tip[:12]}  (once the run is finished, "
        "`ratchet audit` examines such commits)")


def _limits(state: State, until: datetime.datetime | None, budget_runs: int | None, now: datetime.datetime,
            observer: Observer) -> tuple[datetime.datetime | None, int | None]:
    """(time, runs) to stop at: those given now, else those that the run was started with."""
    before = str(state.campaign.get("until") or "")
    if until is None and before:
        until = datetime.datetime.fromisoformat(before)
        if until <= now:
            observer.note(f"the time to stop at ({before}) has passed: give another --until, or stop it with Ctrl-C")
            until = None
    return until, budget_runs or state.campaign.get("budget_runs")


def _start(options: Options, folder: Path, continued: Path | None, observer: Observer,
           on_failure: contextlib.ExitStack) -> tuple[Site, dict[str, Any], engines.Opening]:
    """(site, data of the ``started`` event, engine) of a new campaign."""
    target = _target(options)
    origin = site.locate(target, packaged=options.repo is None)
    tip = ""
    if continued is not None:
        before, _ = replay(continued / "ledger.jsonl")
        tip = _tip_to_continue(before, origin, observer)
        if moved_branch(before, continued / "repo.git") is not None:
            observer.note(f"the accepted branch of {continued.name} was moved by hand: this run starts from the tip "
                          f"that its ledger knows; `ratchet audit {continued.name}` examines the rest")
    if origin.toplevel and git.is_dirty(git.locate(target)):
        observer.note("the target has uncommitted changes: they are left alone and not used; "
                      f"the run starts from commit {origin.start[:12]}")
    origin = site.clone(origin, folder, continued if tip else None, tip)
    if origin.previous:
        observer.note(f"the last run, {origin.previous}, is finished: this one starts from its accepted tip "
                      f"{origin.start[:12]}")
    place, engine = _site(options, folder, origin, options.preset, "", observer, on_failure)
    config = place.config
    _check_ideas(options, place)
    if not config.train.served and "{seed}" not in config.train.command:
        observer.note("train.command takes no {seed}: pairs repeat one seed, if the target fixes one, "
                      "and do not share any noise if it does not")
    chosen = "queue" if options.proposer == "queue" else proposers.choose(_wanted(options), config.model).kind
    return place, {
        "name": folder.name, "target": str(target.resolve()), "target_name": config.name or target.resolve().name,
        "toplevel": origin.toplevel, "prefix": origin.prefix, "origin": origin.start if not tip else
        before.campaign.get("origin", before.campaign["start"]), "start": origin.start, "preset": config.preset,
        "seed": options.seed, "proposer": chosen, "patches": [str(path.resolve()) for path in options.patches],
        "metric": config.metric.name, "direction": config.metric.direction, "tier": config.evaluate.tier,
        "unit": config.budget.unit, "amount": config.budget.amount,
        "steps": _tip_steps(before, config) if tip else _steps(config),
        "device": place.devices[0], "corpus": place.data.corpus if place.data else "",
        "config": config.model_dump(mode="json"), "version": __version__, "previous": origin.previous,
        "policy": _policy(options, config, chosen),
        "ending": calls.ending(options.budget_runs or config.caps.experiments or None),
        "unread": bool(tip) and bool(before.campaign.get("unread", before.campaign["proposer"] != "ideas"))}, engine


def _reopen(options: Options, folder: Path, state: State, observer: Observer,
            on_failure: contextlib.ExitStack, moved: bool = False) -> tuple[Site, dict[str, Any], engines.Opening]:
    """``moved``: the accepted branch may be elsewhere than the ledger says."""
    facts = state.campaign
    origin = Origin(Path(facts["target"]), facts["toplevel"], facts["prefix"], facts["start"], facts["previous"])
    if git.resolve(folder / "repo.git", git.ACCEPTED) is None:
        raise UserError(f"{folder / 'repo.git'} is gone or damaged.", "Start a new run:  ratchet run --name NEW")
    elsewhere = None if moved else moved_branch(state, folder / "repo.git")
    if elsewhere is not None:
        raise elsewhere
    place, engine = _site(options, folder, origin, facts["preset"], facts.get("engine", "local"), observer, on_failure)
    if (place.data.corpus if place.data else "") != facts["corpus"]:
        raise UserError("The prepared data differ from those that this run was measured on.",
                        "Scores would not compare; start a new run:  ratchet run --name NEW")
    return place, facts, engine


def _site(options: Options, folder: Path, origin: Origin, preset: str, begun: str, observer: Observer,
          on_failure: contextlib.ExitStack) -> tuple[Site, engines.Opening]:
    """The site and the engine, which ``on_failure`` closes. ``begun``: the engine that the run was begun on."""
    config = site.read_config(folder / "repo.git", origin.start, origin.prefix, preset, len(site.gpus()))
    kind = engines.chosen(options.engine, begun, config.engine)
    remote = engines.cluster(kind, config.engine, folder)
    if remote is not None:
        on_failure.callback(remote.close)
        config = site.read_config(folder / "repo.git", origin.start, origin.prefix, preset, remote.gpus)
        observer.phase(f"looking for machines ({kind})")
        devices = engines.reserve(remote, config, options.slots, options.max_level)
        for line in remote.notes:
            observer.note(f"{kind}: {line}")
    else:
        devices = site.find_devices(config, options.slots)
        if devices[0] != "cpu" and (silent := gpu.found()[1]):
            observer.note(f"{silent} GPU(s) that the driver lists do not answer nvidia-smi: it goes without them")
    draft = Site(folder, origin.prefix, origin.start, config, None, devices, options.max_level, options.seed)
    data = site.prepare(config, draft.source(origin.start), options.runs.resolve() / ".data", observer.phase)
    return dataclasses.replace(draft, data=data), engines.Opening(kind, remote)


def _proposer(options: Options, place: Site, state: State, observer: Observer, news: News, follows: bool) -> Proposer:
    done = {attempt.proposal.source for attempt in state.attempts.values()}
    if state.campaign["proposer"] == "queue":
        files = [Path(name) for name in state.campaign["patches"]]
        return queue_patches.PatchQueue(queue_patches.read_patches(files), done)
    choice = proposers.choose(_wanted(options), place.config.model)
    others = other_models(place.config)
    for line in (choice.note, *(proposers.notes(others) if choice.kind in MODELS else ())):
        observer.note(line)
    answered = any(attempt.proposal.author == "llm" and attempt.proposal.cost.completion_tokens
                   for attempt in state.attempts.values())
    knobs = search.KnobSearch(state, lambda commit: place.texts(commit)[0], int(state.campaign["seed"]),
                              "random" if choice.kind == "random" else "search")
    if choice.kind in ("search", "random"):
        return knobs
    proposer = proposers.open_proposer(choice, place.config.model, resources.prompts(), int(state.campaign["seed"]),
                                       done, answered=answered, others=others, news=news,
                                       record=lambda: minds.of_state(state))
    if follows:
        observer.note("When the idea book is exhausted, an optimiser over numeric constants goes on.")
        return search.ThenSearch(proposer, knobs)
    return search.Hybrid(proposer, knobs) if choice.kind == "hybrid" else proposer


def _check_ideas(options: Options, place: Site) -> None:
    """Raises UserError where the idea book is all there is and it has nothing for this target."""
    if options.proposer in ("queue", "ideas") or proposers.choose(_wanted(options), place.config.model).kind != "ideas":
        return
    texts, _ = place.texts(place.start)
    fits = any(all(edit.search in texts.get(edit.path, "") for edit in card.edits)
               for card in packaged_ideas(resources.prompts() / "ideas"))
    if not fits:
        raise UserError("There is nothing to try: no model is set up, and no card of the idea book fits this target.",
                        f"Set {place.config.model.key_variable} and RATCHET_MODEL (and OPENAI_BASE_URL for another "
                        "endpoint), or judge patches of yours:  ratchet try my.patch")


def _wanted(options: Options) -> proposers.Wanted:
    known: dict[str, proposers.Wanted] = {kind: kind for kind in ("hybrid", "llm", "search", "random", "ideas")}
    return known.get(options.proposer, "auto")


def _target(options: Options) -> Path:
    return options.repo if options.repo is not None else resources.default_target()


def _failed_at_start(state: State) -> bool:
    """Whether the incumbent's own run failed: the target must be mended, so there is nothing to go on with."""
    return not state.merges and any(
        run.purpose == "baseline" and run.id in state.results and state.results[run.id].fault not in (None, "infra")
        for run in state.runs.values())


def _same_wish(options: Options, state: State) -> bool:
    """Whether an unfinished campaign is what the user asks for again."""
    patches = [str(path.resolve()) for path in options.patches]
    return (not options.preset or options.preset == state.campaign["preset"]) and (
        not patches or patches == state.campaign["patches"])


def _tip_to_continue(before: State, origin: Origin, observer: Observer) -> str:
    """The finished campaign's tip when it started from the user's present commit; empty when the user moved on."""
    if origin.toplevel and before.campaign.get("origin", before.campaign["start"]) != origin.start:
        observer.note(f"the target has new commits since the last run: this one starts from {origin.start[:12]}")
        return ""
    return before.tip


def _policy(options: Options, config: Config, proposer: str) -> str:
    """How candidates are certified: alone where the campaign would end before a bundle is full. Raises UserError."""
    judge = config.judge
    if judge.policy == "bundles" and judge.min_effect:
        raise UserError("judge.min_effect is set, and bundles are certified against no effect at all.",
                        'Set judge.policy = "single" in ratchet.toml, or take min_effect out.')
    if judge.approve and judge.policy == "bundles":
        raise UserError("judge.approve is set: a person approves one change at a time, not a bundle.",
                        'Set judge.policy = "single" in ratchet.toml, or take approve out.')
    if judge.approve:
        return "single"
    if judge.policy != "auto":
        return judge.policy
    budget = options.budget_runs or config.caps.experiments or None
    ends = proposer in FINITE or (budget is not None and budget < BUNDLES_FROM)
    return "single" if ends or judge.min_effect else "bundles"


def _tip_steps(before: State, config: Config) -> int:
    """Steps that the tip of a finished campaign was charged, so that a new night grants it no more."""
    start = before.campaign
    if (start["preset"], start["amount"], start["unit"]) != (config.preset, config.budget.amount, config.budget.unit):
        return _steps(config)
    if before.reverted:
        return before.reverted.steps
    if before.removals:
        return before.removals[-1].steps
    runs_ = before.attempts[before.merges[-1].candidate].runs if before.merges else []
    return next((r.steps for r in reversed(runs_) if r.purpose == "pair"), int(start["steps"]))


def _steps(config: Config) -> int:
    """Steps of the first incumbent's runs; 0 where the command counts for itself."""
    return int(config.budget.amount) if config.budget.unit in ("steps", "charged_steps") else 0
