"""The command line. Each command gathers its options, asks one room, and prints. ``main`` is the one error edge.

Exit codes: 0 done, 1 the user must mend something, 2 wrong usage or a fault of ratchet itself, 130 stopped.
Rooms are imported inside the commands, so that `ratchet status` does not wait for matplotlib.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from agent import __version__, cli_steering, runs
from agent.errors import UserError
from agent.ledger import State, replay
from agent.show import view

if TYPE_CHECKING:
    from agent.campaign import Options

app = typer.Typer(name="ratchet", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Improve a training repo overnight: propose, train in pairs, judge, merge, report.")

RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of the runs.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the newest one if left out.",
                                             show_default=False)]
NameOption = Annotated[str, typer.Option("--name", help="Name of the run.", show_default=False)]
PresetOption = Annotated[str, typer.Option("--preset", help="Preset of ratchet.toml.", show_default=False)]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the campaign.")]
SlotsOption = Annotated[int | None, typer.Option("--slots", min=1, help="Jobs side by side; as many as fit if left "
                                                 "out.", show_default=False)]
LevelOption = Annotated[int, typer.Option("--level", min=0, max=3, help="Highest isolation level to use.")]
UnconfinedOption = Annotated[bool, typer.Option("--unconfined", help="At level 0, run patches that nobody has read "
                                                "all the same.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start a new run from the target's newest commit, whatever "
                                           "earlier runs merged or left unfinished.")]
EngineOption = Annotated[str, typer.Option("--engine", show_default=False, help="local, ray or slurm; that of "
                                           "ratchet.toml if left out.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ratchet {__version__}")
        raise typer.Exit


@app.command("run")
def run_command(
    repo: Annotated[Path | None, typer.Argument(help="Target: a git repository or a folder inside one; the one that "
                                                "comes with ratchet if left out.", show_default=False)] = None,
    preset: PresetOption = "",
    budget_runs: Annotated[int | None, typer.Option("--budget-runs", min=1, metavar="N", show_default=False,
                                                    help="Stop after N training runs.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", show_default=False,
                                              help="Stop at this time: 07:00, or an ISO date and time.")] = None,
    proposer: Annotated[str, typer.Option("--proposer", show_default=False,
                                          help="hybrid, llm, search, random or ideas; hybrid if a model is "
                                               "named, else ideas.")] = "",
    name: NameOption = "", seed: SeedOption = 0, slots: SlotsOption = None, folder: RunsOption = RUNS,
    level: LevelOption = 3, unconfined: UnconfinedOption = False, fresh: FreshOption = False,
    engine: EngineOption = "",
    cap: Annotated[list[str] | None, typer.Option("--cap", metavar="NAME=N", show_default=False,
                                                  help="A cap of ratchet.toml's [caps], e.g. usd=5 or gpu_hours=8; may "
                                                  "be given several times.")] = None,
) -> None:
    """Run a campaign, or go on with the newest one that is not finished. Ctrl-C stops it cleanly."""
    if proposer not in ("", "hybrid", "llm", "search", "random", "ideas"):
        raise UserError(f"There is no proposer {proposer!r}.",
                        "Choose hybrid, llm, search, random or ideas; for patch files: `ratchet try`.")
    target = _existing(repo)
    from agent.campaign import Options
    _campaign(Options(repo=target, preset=preset, name=name, proposer=proposer, budget_runs=budget_runs,
                      until=until, seed=seed, slots=slots, max_level=level, unconfined=unconfined, fresh=fresh,
                      runs=folder, engine=engine, caps=tuple(cap or ())))


@app.command("try")
def try_command(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH...", help="Patch files, judged in this order.")],
    repo: Annotated[Path | None, typer.Option("--repo", help="Target; the one that comes with ratchet if left out.",
                                              show_default=False)] = None,
    preset: PresetOption = "", name: NameOption = "", seed: SeedOption = 0, slots: SlotsOption = None,
    folder: RunsOption = RUNS, level: LevelOption = 3, unconfined: UnconfinedOption = False, fresh: FreshOption = False,
    engine: EngineOption = "",
) -> None:
    """Judge your own patches exactly as proposals are judged."""
    target = _existing(repo)
    for patch in patches:
        if not patch.is_file():
            raise UserError(f"There is no patch file {patch}.", "Give unified diffs, e.g. from `git diff`.")
    from agent.campaign import Options
    from agent.queue_patches import read_patches
    read_patches(patches)  # before anything is made: a bad file leaves no empty run behind
    _campaign(Options(repo=target, preset=preset, name=name, proposer="queue", patches=tuple(patches),
                      seed=seed, slots=slots, max_level=level, unconfined=unconfined, fresh=fresh, runs=folder,
                      engine=engine))


@app.command("status")
def status_command(name: NameArgument = "", as_json: JsonOption = False, folder: RunsOption = RUNS) -> None:
    """Where a run stands. The newest one if no name is given."""
    place, state = _load(folder, name)
    alive = runs.held(place)
    if as_json:
        typer.echo(json.dumps(view.status(state, alive), allow_nan=False))
    else:
        _print(view.status_lines(state, alive))


@app.command("log")
def log_command(name: NameArgument = "", folder: RunsOption = RUNS) -> None:
    """One line an attempt, newest last."""
    _, state = _load(folder, name)
    from agent.show import audit_view
    _print([*([view.log_line(row) for row in view.rows(state)] or ["no attempts yet"]), *view.revert_lines(state),
            *audit_view.lines(state)])


@app.command("show")
def show_command(wanted: Annotated[str, typer.Argument(metavar="ID", help="Id or number of an attempt.")],
                 name: NameOption = "", folder: RunsOption = RUNS) -> None:
    """Everything on one attempt: hypothesis, diff, preflight, pairs, verdict, logs."""
    place, state = _load(folder, name)
    from agent.show import audit_view
    attempt = view.find(state, wanted)
    _print([*view.show_lines(state, attempt, str(place)), *audit_view.of_attempt(state, attempt)])


@app.command("recompute")
def recompute_command(wanted: Annotated[str, typer.Argument(metavar="ID", help="Id or number of an attempt, or audit-N "
                                                            "for the removal of a closing audit.")],
                      name: NameOption = "", folder: RunsOption = RUNS) -> None:
    """Do the sums of a verdict again from the runs in the ledger, and compare them with what was written."""
    from agent import recompute
    place, state = _load(folder, name)
    repo = place.resolve() / "repo.git"
    found = (recompute.removal(state, wanted, repo) if wanted.startswith("audit-") else
             recompute.recompute(state, view.find(state, wanted), repo))
    _print(recompute.lines(found))
    raise typer.Exit(0 if all(figure.same for figure in found) else 1)


@app.command("prompt")
def prompt_command(
    repo: Annotated[Path | None, typer.Argument(help="Target; without one the newest run, or that of --name.",
                                                show_default=False)] = None,
    preset: PresetOption = "", name: NameOption = "", as_json: JsonOption = False, folder: RunsOption = RUNS,
) -> None:
    """Print exactly what would be sent to a model for the next attempt of a run, or the first one on a target."""
    from agent.show import prompt_view
    known = repo is None and (name or runs.names(folder))
    found = prompt_view.of_run(*_load(folder, name)) if known else prompt_view.of_target(_existing(repo), preset)
    _print([json.dumps(prompt_view.request(*found))] if as_json else prompt_view.lines(*found))


@app.command("report")
def report_command(name: NameArgument = "", folder: RunsOption = RUNS) -> None:
    """Write the report (Markdown) with its picture, and print where it lies."""
    from agent import report
    place, state = _load(folder, name)
    typer.echo(str(report.write(state, place)))


@app.command("trace")
def trace_command(
    name: NameArgument = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE", show_default=False,
                                             help="Where to write it; trace.json in the run's folder if left "
                                             "out.")] = None,
    folder: RunsOption = RUNS,
) -> None:
    """Write the run as a trace for chrome://tracing or ui.perfetto.dev: slots, questions to the model, verdicts."""
    from agent import ledger
    from agent.show import trace
    place = runs.resolve(folder, name)
    target = out or place / "trace.json"
    try:
        target.write_text(json.dumps(trace.trace(ledger.events(place / runs.LEDGER))) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot write {target}: {error.strerror}.", "Give another file with -o.") from error
    typer.echo(str(target))


@app.command("export")
def export_command(
    name: NameArgument = "",
    branch: Annotated[str, typer.Option("--branch", metavar="B", show_default=False,
                                        help="Make this branch in the target's repository; nothing is checked "
                                        "out.")] = "",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False,
                                             help="Write a patch series for `git am` here.")] = None,
    push: Annotated[str, typer.Option("--push", metavar="URL", show_default=False,
                                      help="Push the accepted branch to this remote.")] = "",
    folder: RunsOption = RUNS,
) -> None:
    """Hand over what was merged: a branch, a patch series, or a push. Without an option: a series in the run."""
    from agent import export
    place, state = _load(folder, name)
    if not state.merges:
        raise UserError(f"Run {place.name} has merged nothing, so there is nothing to export.",
                        "`ratchet log` says what was tried and why it was refused.")
    repo = place.resolve() / "repo.git"  # git is started in there, so a relative path would lead nowhere
    start, toplevel = str(state.campaign["start"]), str(state.campaign.get("toplevel") or "")
    if push:
        name = branch or f"ratchet/{place.name}"
        export.push(repo, push, start, name, Path(toplevel) if toplevel else None)
        _print([f"pushed the accepted branch to {push} as {name}"])
    elif branch:
        if not toplevel:
            raise UserError("The default target is in no repository of yours, so there is no place for a branch.",
                            "Use --out DIR for a patch series, or --push with a repository of yours.")
        export.export_branch(repo, Path(toplevel), start, branch)
        _print([f"branch {branch} in {toplevel}; see it with:  git -C {toplevel} log -p {start[:12]}..{branch}"])
    if out is not None or not (branch or push):
        series = export.export_series(repo, start, out or place / "patches")
        _print([*map(str, series.patches), str(series.bundle),
                "apply them at the root of the repository with:  git am "
                + str(series.patches[0].parent.resolve() / "*.patch")])


@app.command("audit")
def audit_command(
    name: NameArgument = "",
    pairs: Annotated[int | None, typer.Option("--pairs", min=2, metavar="N", show_default=False, help="Fresh pairs a "
                                              "merge at most; 8 if left out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be trained.")] = False,
    slots: SlotsOption = None, level: LevelOption = 3, unconfined: UnconfinedOption = False,
    as_json: JsonOption = False, folder: RunsOption = RUNS,
) -> None:
    """Close a finished run: take each merge out of the tip again, and remove what the tip can do without."""
    from rich.console import Console

    from agent import closing
    from agent.opening import Options
    from agent.show import audit_view
    from agent.show.screen import open_screen
    place = runs.resolve(folder, name).resolve()
    if dry_run:
        drawn, most, _ = closing.dry(place, pairs)
        _print([json.dumps({"runs_at_most": most, "pairs": drawn.pairs, "commits": len(drawn.commits)})] if as_json
               else audit_view.dry_lines(drawn, most))
        return
    facts = replay(place / runs.LEDGER)[0].campaign
    options = Options(Path(facts["target"]), preset=str(facts["preset"]), slots=slots, max_level=level,
                      unconfined=unconfined, runs=folder)
    with open_screen(Console(highlight=False, stderr=as_json)) as screen, _end_like_ctrl_c():
        state = closing.audit(options, place.name, pairs, screen)
    _print([json.dumps(audit_view.facts(state), allow_nan=False)] if as_json else audit_view.lines(state))


@app.command("doctor")
def doctor_command(
    repo: Annotated[Path | None, typer.Argument(help="Target or run to look at.", show_default=False)] = None,
    preset: PresetOption = "", folder: RunsOption = RUNS, engine: EngineOption = "", slots: SlotsOption = None,
    model: Annotated[bool, typer.Option("--model", help="Probe the models instead, by some small questions.")] = False,
) -> None:
    """Look whether this machine and this target can run, and how to mend what is wrong. With --engine: whether those
    machines can, by jobs of a second. With --model: what the endpoint can do, and how it will be asked. Given a run
    (its name or folder): whether that is sound, and what the next start would mend.
    """
    from agent.doctor import checks, run_folder
    from agent.doctor import engine as of_engine
    from agent.doctor import model as of_model
    failed = False
    run = run_folder.find(folder, repo)
    found = (run_folder.examine(run) if run else of_model.examine(repo, preset) if model else
             of_engine.examine(engine, repo, folder, preset, slots) if engine else
             checks.examine(repo, folder, preset))
    for check in found:
        _print([check.line()])
        failed = failed or check.state == "error"
    raise typer.Exit(1 if failed else 0)


@app.command("gc")
def gc_command(
    keep: Annotated[int, typer.Option("--keep", min=0, metavar="N", help="Leave the N newest runs whole.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")] = False,
    folder: RunsOption = RUNS,
) -> None:
    """Free the job folders and sources of old runs. Ledgers, reports and accepted commits stay."""
    freed = runs.collect(folder, keep, dry_run)
    done = "would be freed" if dry_run else "freed"
    for one in freed:
        _print([f"{one.name}: in use, left alone" if one.in_use else f"{one.name}: {one.megabytes:.1f} MB {done}"])
    total = sum(one.megabytes for one in freed if not one.in_use)
    _print([f"{total:.1f} MB {done} (the {keep} newest runs are left whole; see --keep)"])


@app.command("calibrate")
def calibrate_command(
    repo: Annotated[Path | None, typer.Argument(help="Target; the one that comes with ratchet if left out.",
                                                show_default=False)] = None,
    preset: PresetOption = "",
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Seeds that the target's start is trained on.")
                     ] = 6,
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", show_default=False,
                                              help="Budget of a run, in the target's unit (steps or seconds); the "
                                              "target's own if left out.")] = None,
    long: Annotated[int | None, typer.Option("--long", min=1, metavar="N", show_default=False,
                                             help="Second, larger budget at which the patches are compared too.")
                    ] = None,
    cards: Annotated[str | None, typer.Option("--cards", metavar="A,B", show_default=False,
                                              help="Idea cards to measure the paired noise on; three of the idea book "
                                              "on the default target, else none.")] = None,
    ideas: Annotated[Path | None, typer.Option("--ideas", metavar="DIR", show_default=False,
                                               help="Folder of the cards; the idea book if left out.")] = None,
    slots: SlotsOption = None, level: LevelOption = 3, folder: RunsOption = RUNS, as_json: JsonOption = False,
) -> None:
    """Train the target's start, and say what a night could see: noise, smallest effect, speed, pitfalls."""
    target = _existing(repo)
    from agent import calibrate, calibration
    with _end_like_ctrl_c():
        facts = calibrate.calibrate(
            calibrate.Options(target, preset, folder, seeds, steps or 0, long or 0, cards, ideas, slots, level),
            lambda line: typer.echo(line, err=True))
    _print([json.dumps(facts, allow_nan=False)] if as_json else calibration.lines(facts))
    raise typer.Exit(0 if facts["usable"] else 1)


@app.command("promote")
def promote_command(
    name: NameArgument = "", preset: PresetOption = "",
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", show_default=False,
                                              help="Budget of a run there, in the target's unit.")] = None,
    pairs: Annotated[int, typer.Option("--pairs", metavar="N", help="Fresh seeds for each comparison.")] = 4,
    each: Annotated[bool, typer.Option("--each", help="Also leave out each merge in turn.")] = False,
    slots: SlotsOption = None, level: LevelOption = 3, folder: RunsOption = RUNS, as_json: JsonOption = False,
) -> None:
    """Try what a run merged again, at a larger preset or a longer budget: does the gain transfer?"""
    from agent import promote, promotion
    from agent.records import to_json
    with _end_like_ctrl_c():
        found = promote.promote(promote.Options(folder, name, preset, steps or 0, pairs, each, slots, level),
                                lambda line: typer.echo(line, err=True))
    _print([json.dumps(to_json(found), allow_nan=False)] if as_json else promotion.lines(found))


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_command(context: typer.Context, name: Annotated[str, typer.Argument(help="Which measurement.")],
                  as_json: JsonOption = False) -> None:
    """Repeat a measurement that the documents quote: effects, noise, startup, mfu, box, audit,
    attacks, bank, replay, habit, pipeline, llm-faults, caps, chaos, memory, proposers,
    soak, weigh or policy.

    Further options go to it; `ratchet bench NAME -- --help` lists them.
    """
    from agent.bench import command
    with _end_like_ctrl_c():
        raise typer.Exit(command.run(name, as_json, context.args))


cli_steering.add(app)


def main() -> NoReturn:
    """Entry point: run the command line and exit."""
    sys.exit(edge(sys.argv[1:]))


def edge(arguments: Sequence[str]) -> int:
    """The exit code of one command. What the user must mend is one line; a fault of ratchet is a saved traceback."""
    try:
        typer.main.get_command(app)(args=list(arguments), prog_name="ratchet")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = 130
    except UserError as error:
        return _complain(str(error), 1)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = f" ({error.filename})" if error.filename else ""
            return _complain(f"The disk is full{where}. Free some (`ratchet gc` frees old runs), then run the same "
                             "command again.", 1)
        return _crashed(error)
    except Exception as error:
        return _crashed(error)
    if code == 130:
        resumes = arguments[:1] != ["bench"]
        print("stopped; the same command goes on from here" if resumes else "stopped", file=sys.stderr)
    return code


def _complain(text: str, code: int) -> int:
    print(f"ratchet: {view.clean(text)}", file=sys.stderr)
    return code


def _crashed(error: Exception) -> int:
    """A fault of ratchet itself: a short line for the user, the traceback in a file for who mends it."""
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ratchet-crash-", suffix=".txt", delete=False) as file:
            file.write(f"ratchet {__version__}, Python {sys.version}\n{sys.argv}\n\n{trace}")
    except OSError:
        sys.stderr.write(trace)
        return _complain(f"This is a fault of ratchet: {type(error).__name__}: {error}", 2)
    return _complain(f"This is a fault of ratchet: {type(error).__name__}: {error}. The traceback is in {file.name}; "
                     "what was decided so far is safe in the run's ledger.", 2)


def _campaign(options: Options) -> None:
    """Run a campaign behind a screen, then say where its report lies and what to do next."""
    from rich.console import Console

    from agent import campaign
    from agent.show.screen import open_screen
    with open_screen(Console(highlight=False)) as screen, _end_like_ctrl_c():
        try:
            code = campaign.run(options, screen)
        except KeyboardInterrupt:
            code = 130
    state = screen.state
    if state is not None and code == 0:
        name = str(state.campaign["name"])
        where = "" if options.runs == RUNS else f" --runs {options.runs}"
        command = "ratchet" if shutil.which("ratchet") else sys.argv[0]
        _print([f"report {options.runs / name / 'report' / 'report.md'}",
                f"next   `{command} export {name}{where}` hands over what was merged; "
                f"`{command} log {name}{where}` says why the rest was refused" if state.merges else
                f"next   `{command} log {name}{where}` says why each idea was refused"])
    raise typer.Exit(code)


@contextlib.contextmanager
def _end_like_ctrl_c() -> Iterator[None]:
    """A closed terminal or a service manager stops the campaign as cleanly as Ctrl-C. What nohup ignores stays so."""
    wanted = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def _load(folder: Path, name: str) -> tuple[Path, State]:
    place = runs.resolve(folder, name)
    return place, replay(place / runs.LEDGER)[0]


def _existing(repo: Path | None) -> Path | None:
    if repo is not None and not repo.is_dir():
        what = "is not a folder" if repo.exists() else "does not exist"
        raise UserError(f"{repo} {what}.", "Give the folder of a git repository, or a folder inside one.")
    return repo


def _print(lines: Sequence[str]) -> None:
    """Lines as they are: piped output has no colour and no wrapping."""
    for line in lines:
        typer.echo(line)


if __name__ == "__main__":
    main()
