"""What every engine promises, asked of each in the same words; and whole campaigns on clusters that lose machines.

The local engine is asked always; Ray (``-m ray``) and Slurm (``-m slurm``) where they are installed: real clusters of
one machine, from ray_site.py and slurm_site.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_site import RaySite
from sandbox_world import World, alive, until
from slurm_site import SlurmSite, missing
from test_campaign import KNOWN, check_sound, environment, known, load, merged_titles, serving
from test_campaign import Script as Answers

from agent import cli, engines, tiny
from agent.config import Engine as Table
from agent.errors import UserError
from agent.ledger import State
from sandbox import gpu, parcels
from sandbox.engine import Engine, LocalEngine
from sandbox.engine_ray import RayEngine
from sandbox.engine_slurm import Request, SlurmEngine
from sandbox.job import JOB, Job, Result, bulk_file, read_result
from sandbox.slurm_start import given

ON_RAY, ON_SLURM = (pytest.mark.ray, pytest.mark.timeout(400)), (pytest.mark.slurm, pytest.mark.timeout(400))


@pytest.fixture(scope="module")
def ray_site() -> Iterator[RaySite]:
    pytest.importorskip("ray")
    site = RaySite()
    yield site
    site.stop()


@pytest.fixture(scope="module")
def slurm_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmSite]:
    if missing():
        pytest.skip(f"lacks {', '.join(missing())}")
    site = SlurmSite(tmp_path_factory.mktemp("slurm"))
    site.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
        yield site
        site.stop()


class Ground:
    """An engine with what the tests need of it: another object of its kind, its device, and an accident."""

    def __init__(self, folder: Path, kind: str, site: Any) -> None:
        self.world, self.kind, self.site = World(folder), kind, site
        self.engine = self.another()
        self.device = self.engine.reserve(False, 1, 2, 3)[0] if not isinstance(self.engine, LocalEngine) else "cpu"

    def another(self) -> Any:
        if self.kind == "ray":
            return RayEngine(self.world.folder, self.site.address)
        return SlurmEngine(Request()) if self.kind == "slurm" else LocalEngine()

    def job(self, source: Path, **more: object) -> Job:
        return dataclasses.replace(self.world.job(source, **more), device=self.device)  # type: ignore[arg-type]

    def slow(self, mark: str) -> Path:
        """A job that starts a process which would outlive it, marked by its command line."""
        return self.world.source(
            "from fake import *\nimport subprocess\n"
            f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])\n"
            "train(on_batch=lambda step: time.sleep(0.2))\n")

    def accident(self, folder: Path) -> None:
        """What runs the job dies without a word."""
        if self.kind == "slurm":
            kill_supervisor(next(folder.glob("start-*")))
        elif self.kind == "ray":
            actor = next(slot.actor for slot in self.engine._slots if slot.job == folder)
            os.kill(self.engine._ray.get(actor.__ray_call__.remote(lambda node: os.getpid())), signal.SIGKILL)
        else:
            kill_supervisor(folder)


def kill_supervisor(folder: Path) -> None:
    os.kill(int((folder / "supervisor.pid").read_text(encoding="ascii").split()[0]), signal.SIGKILL)


@pytest.fixture(params=["local", pytest.param("ray", marks=ON_RAY), pytest.param("slurm", marks=ON_SLURM)])
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ground]:
    site = None if request.param == "local" else request.getfixturevalue(f"{request.param}_site")
    ground = Ground(tmp_path, request.param, site)
    yield ground
    ground.engine.close()
    if request.param == "ray":
        ground.engine._ray.shutdown()


def finished(engine: Engine, folder: Path) -> Result:
    result: Result = until(lambda: engine.poll(folder))
    return result


def test_a_result_appears_whole_with_all_that_belongs_to_it(ground: Ground) -> None:
    engine, folder, seen = ground.engine, ground.world.folder / "job", []

    def watch() -> None:
        while not seen:
            if read_result(folder) is not None:  # raises on half a file
                seen.append({path.name for path in folder.iterdir()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine.start(folder, ground.job(ground.world.source(), evaluation=ground.world.sealed(), keep_weights=True))
    result = finished(engine, folder)
    watcher.join(10)
    assert (result.fault, result.id, set(result.scores)) == (None, "job", {"val", "confirm"}), result
    assert {"log.txt", "weights.safetensors", "bulk-val.npy", "bulk-confirm.npy"} <= seen[0]
    assert "val_bpb: 0.10" in (folder / "log.txt").read_text(encoding="utf-8")
    assert bulk_file(folder, "val").stat().st_size > 64 * 24 * 4 and (result.level, result.tier) == (3, "sealed")
    with pytest.raises(FileExistsError):
        engine.start(folder, ground.job(ground.world.source()))
    engine.stop(folder)  # of an ended job: nothing happens
    assert engine.poll(folder) == result
    # its weights and answers can be asked again, by a job that is told where they lie on this machine
    again = ground.job(Path(JOB.validate_json((folder / "job.json").read_bytes()).source), kind="audit",
                       evaluation=ground.world.sealed(), bulk=str(folder), weights=str(folder / "weights.safetensors"))
    engine.start(ground.world.folder / "audit", again)
    audit = finished(engine, ground.world.folder / "audit")
    assert audit.fault is None and audit.weights_sha256 == result.weights_sha256, audit


def test_progress_is_seen_and_stop_reaches_the_whole_tree(ground: Ground) -> None:
    mark, engine, folder = f"mark{uuid.uuid4().hex}", ground.engine, ground.world.folder / "job"
    engine.start(folder, ground.job(ground.slow(mark), steps=200))

    def seen() -> bool:
        assert engine.poll(folder) is None
        progress = engine.progress(folder)
        return progress is not None and progress.step >= 2 and bool(alive(mark))

    until(seen)
    engine.stop(folder)
    result = finished(engine, folder)
    assert (result.fault, result.message, alive(mark)) == ("infra", "stopped", [])
    assert 2 <= result.steps < 200


def test_whoever_rests_hears_of_an_end_in_time(ground: Ground) -> None:
    engine, folders = ground.engine, [ground.world.folder / name for name in ("long", "short")]
    for folder, steps in zip(folders, (100, 2), strict=True):
        engine.start(folder, ground.job(ground.slow(folder.name), steps=steps))
    deadline = time.monotonic() + 40
    while (result := [engine.poll(folder) for folder in folders][1]) is None:
        left = deadline - time.monotonic()
        assert left > 0
        engine.rest(folders, left)  # would take all of it if nobody heard
    assert result.steps == 2 and time.monotonic() < deadline - 5
    assert engine.poll(folders[0]) is None
    begun = time.monotonic()
    engine.rest(folders[:1], 0.3)
    assert time.monotonic() - begun < 2
    engine.stop(folders[0])


def test_another_object_takes_a_job_over_by_its_folder(ground: Ground) -> None:
    folder = ground.world.folder / "job"
    ground.engine.start(folder, ground.job(ground.slow("x"), steps=5))
    second = ground.another()
    if ground.kind == "ray":
        assert ground.device in second.reserve(False, 1, 2, 3)
    assert second.poll(folder) is None
    assert finished(second, folder).steps == 5


def test_a_lost_job_is_infra_leaves_nothing_and_stays_lost(ground: Ground) -> None:
    mark, engine, folder = f"mark{uuid.uuid4().hex}", ground.engine, ground.world.folder / "job"
    engine.start(folder, ground.job(ground.slow(mark), steps=200))
    until(lambda: engine.poll(folder) or alive(mark))
    ground.accident(folder)
    result = finished(engine, folder)
    assert result.fault == "infra" and result.message.startswith("lost"), result
    until(lambda: not alive(mark), 20)
    assert engine.poll(folder) == result
    engine.start(ground.world.folder / "again", ground.job(ground.world.source()))
    assert finished(engine, ground.world.folder / "again").fault is None  # the engine goes on


def test_a_folder_that_was_never_started_is_lost(ground: Ground) -> None:
    folder = ground.world.job_folder(ground.world.job(ground.world.source()))
    result = ground.engine.poll(folder)
    assert result is not None and result.fault == "infra"


def test_the_environment_of_the_agent_reaches_no_supervisor(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    if ground.kind == "ray":
        pytest.skip("the nodes were started by somebody else, in an environment of their own")
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    mark, folder = f"mark{uuid.uuid4().hex}", ground.world.folder / "job"
    ground.engine.start(folder, ground.job(ground.slow(mark), steps=200))
    until(lambda: ground.engine.poll(folder) or alive(mark))
    supervisors = alive(str(folder))
    assert supervisors
    for pid in supervisors:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
    ground.engine.stop(folder)


# --------------------------------------------------------------------------------------------- parcels, and choosing


def test_a_job_that_was_packed_is_the_same_on_the_other_side(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("bulk-val.npy", "log.txt"):
        (tmp_path / "out" / name).write_bytes(name.encode())
    hidden = (os.__file__, "/elsewhere/text.py")
    job = world.job(world.source(), evaluation=world.sealed(), bulk=str(tmp_path / "out"), hidden=hidden)
    packer, store = parcels.Packer(), parcels.Store(tmp_path / "node")
    portable, wanted = packer.pack(job)
    assert str(tmp_path) not in JOB.dump_json(portable).decode() and os.__file__ not in portable.hidden
    for parcel in wanted:
        for inner, _, mode in parcel.parts:
            path = parcel.origin if inner == "." else parcel.origin / inner
            store.put(parcel.name, "me", inner, mode, path.read_bytes())
        store.done(parcel.name, "me")
        assert store.has(parcel.name)
    arrived = parcels.named(portable, lambda name, _: str(store.place(name)))
    assert [path.name for path in Path(arrived.bulk).iterdir()] == ["bulk-val.npy"]
    assert Path(arrived.source, "train.py").read_bytes() == Path(job.source, "train.py").read_bytes()
    assert job.batches and arrived.batches
    assert Path(arrived.batches.tokens).read_bytes() == Path(job.batches.tokens).read_bytes()
    assert tuple(map(parcels.local, arrived.hidden)) == hidden and (tmp_path / "node/files").stat().st_mode & 0o77 == 0
    assert packer.pack(job)[0] == portable
    Path(job.source, "train.py").write_text("print(1)", encoding="utf-8")
    assert packer.pack(job)[0].source != portable.source  # another content, another name


def test_a_parcel_that_arrives_damaged_or_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    store = parcels.Store(tmp_path)
    store.put("file-0000", "me", ".", 0o644, b"other bytes")
    with pytest.raises(ValueError, match="arrived as"):
        store.done("file-0000", "me")
    assert not store.has("file-0000")
    with pytest.raises(ValueError, match="leaves its folder"):
        store.put("folder-0000", "me", "../x", 0o644, b"")
    with pytest.raises(ValueError, match="leaves its folder"):
        parcels.bring(tmp_path, "/tmp/x", 0o644, iter([b""]))


def test_an_engine_is_chosen_by_flag_then_run_then_config() -> None:
    assert engines.chosen("", "", Table()) == "local"
    assert engines.chosen("", "", Table(kind="slurm")) == "slurm"
    assert engines.chosen("", "ray", Table(kind="slurm")) == "ray"
    assert engines.chosen("local", "", Table(kind="slurm")) == "local"
    for asked, begun, text in (("slum", "", "Choose one of: local, ray, slurm"), ("ray", "local", "was begun on")):
        with pytest.raises(UserError, match=text):
            engines.chosen(asked, begun, Table())


def test_nothing_of_ray_is_imported_unless_it_is_asked_for() -> None:
    code = "import sys, agent.cli, agent.campaign, agent.doctor.engine; print([m for m in sys.modules if 'ray' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          env=environment())
    assert not {"ray", "sandbox.engine_ray"} & set(eval(done.stdout))


def test_the_device_of_a_node_is_the_one_that_slurm_gave() -> None:
    assert given("cuda:0", "3,5") == "cuda:3" and given("cuda:0", "") == "cuda:0" and given("cpu", "3") == "cpu"


def test_doctor_proves_the_local_engine_by_real_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_tiny_target(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    assert cli.edge(["doctor", "target", "--engine", "local", "--slots", "2"]) == 0
    told = capsys.readouterr().out
    assert told.count("ran and came home whole") == 2 and "a running job was ended" in told
    assert cli.edge(["doctor", "target", "--engine", "slum"]) == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_slurm_that_is_not_there_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_tiny_target(tmp_path / "target")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("git", "env"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli.edge(["run", "target", "--engine", "slurm", "--proposer", "llm"]) == 1
    told = capsys.readouterr().err
    assert "Slurm's commands do not work here: there is no sinfo" in told and len(told.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------- campaigns

TITLES = ("less smoothing", "another salt", "more uniform", "late crash")


def answers() -> Answers:
    return Answers([known(title) for title in TITLES])


def verdicts(state: State) -> dict[str, tuple[str, str]]:
    return {a.proposal.title: (a.verdict.outcome, a.verdict.stage) for a in state.attempts.values() if a.verdict}


def effect(state: State, title: str) -> float:
    (found,) = [a.verdict.estimate.effect for a in state.attempts.values()
                if a.proposal.title == title and a.verdict and a.verdict.estimate]
    return found


def weights(state: State) -> dict[tuple[str, int, int], str]:
    """Hash of what each full run came to. Which seeds two slots need depends on what ends first, so not all are run
    in every campaign."""
    return {(run.tree, run.seed, run.steps): state.results[run.id].weights_sha256 for run in state.runs.values()
            if run.trains and state.results[run.id].fault is None}


def campaign(place: Path, engine: str, model: dict[str, str], site: Any, *more: str) -> subprocess.Popen[str]:
    if not (place / "target").exists():
        tiny.write_tiny_target(place / "target")
    extra = site.environment if engine == "slurm" else {"RAY_ADDRESS": site.address} if engine == "ray" else {}
    return subprocess.Popen(
        [sys.executable, "-m", "agent.cli", "run", "target", "--engine", engine, "--slots", "2", "--name", "n", *more],
        cwd=place, env=environment(model) | extra, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def running(place: Path) -> list[Any]:
    """Full runs of the campaign that have a folder and no result in the ledger."""
    if not (place / "runs/n/ledger.jsonl").exists():
        return []
    return [run for run in load(place / "runs/n").open_runs if run.trains and (place / "runs/n" / run.folder).exists()]


def slower(place: Path) -> None:
    """A target whose runs take some two seconds, so that something can happen in the middle."""
    tiny.write_tiny_target(place / "target")
    file = place / "target/train.py"
    longer = "        step += 1\n        import time; time.sleep(0.07)\n"
    file.write_text(file.read_text(encoding="utf-8").replace("        step += 1\n", longer), encoding="utf-8")
    tiny.commit(place / "target", "Slower")


@pytest.mark.parametrize("engine", [pytest.param("ray", marks=ON_RAY), pytest.param("slurm", marks=ON_SLURM)])
def test_a_campaign_gives_the_same_verdicts_as_on_this_machine(engine: str, tmp_path: Path,
                                                               request: pytest.FixtureRequest) -> None:
    site = request.getfixturevalue(f"{engine}_site")
    told = {}
    for kind in ("local", engine):
        (tmp_path / kind).mkdir()
        with serving(answers()) as (_, model):
            done = campaign(tmp_path / kind, kind, model, site)
            out = done.communicate(timeout=300)[0]
        assert done.returncode == 0, out
        told[kind] = check_sound(tmp_path / kind / "runs/n")
    here, there = told["local"], told[engine]
    assert verdicts(there) == verdicts(here) and set(verdicts(here)) >= set(TITLES)
    assert merged_titles(there) == merged_titles(here) == ["less smoothing"] and here.gain and there.gain
    assert there.gain.effect == pytest.approx(here.gain.effect, abs=1e-6)  # audits draw at random: 1e-9
    trained = [weights(state) for state in (here, there)]
    common = trained[0].keys() & trained[1].keys()
    assert len(common) > 10 and all(trained[0][run] == trained[1][run] for run in common)
    if engine == "ray":
        assert len({run.device for run in there.runs.values()}) == 2
        devices: dict[int, set[str]] = {}
        for run in there.runs.values():
            if run.purpose != "preflight":
                devices.setdefault(run.seed, set()).add(run.device)
        assert all(len(found) == 1 for found in devices.values())  # a seed's runs are on one node


def after_an_accident(place: Path, out: str, code: int) -> State:
    """Nothing is lost and nothing counted twice."""
    assert code == 0, out
    state = check_sound(place / "runs/n")
    lost = [r for r in state.results.values() if r.fault == "infra" and r.message != "stopped"]
    assert lost and merged_titles(state) == ["less smoothing"] and not state.open_runs
    assert {a.proposal.title for a in state.attempts.values()} >= set(TITLES)
    assert effect(state, "less smoothing") == pytest.approx(KNOWN["less smoothing"].effect, abs=0.03)
    done = Counter((r.tree, r.seed, r.steps, r.purpose, r.audits) for r in state.runs.values()
                   if state.results[r.id].fault != "infra")
    assert max(done.values()) == 1
    return state


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_node_of_ray_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    site = RaySite()
    try:
        slower(tmp_path)
        with serving(answers()) as (_, model):
            done = campaign(tmp_path, "ray", model, site)
            run = until(lambda: next((run for run in running(tmp_path) if run.purpose == "pair" and (
                tmp_path / "runs/n" / run.folder / "progress.json").exists()), None), 120)
            site.kill(run.device.split(":")[1])
            out = done.communicate(timeout=300)[0]
        state = after_an_accident(tmp_path, out, done.returncode)
        assert state.results[run.id].fault == "infra" and "is gone" in state.results[run.id].message
    finally:
        site.stop()


@pytest.mark.slurm
@pytest.mark.timeout(400)
@pytest.mark.parametrize("accident", ["job", "requeue", "node", "controller", "ratchet"])
def test_an_accident_under_slurm_loses_nothing(accident: str, tmp_path: Path, slurm_site: SlurmSite) -> None:
    slower(tmp_path)
    with serving(answers()) as (_, model):
        done = campaign(tmp_path, "slurm", model, slurm_site)
        run = until(lambda: next((run for run in running(tmp_path) if str(run.candidate).endswith("less-smoothing")
                                  and run.purpose == "pair" and list((tmp_path / "runs/n" / run.folder).glob(
                                      "start-*/progress.json"))), None), 120)  # no other is sure to end by itself
        folder = tmp_path / "runs/n" / run.folder
        number = next(folder.glob("start-*")).name.split("-")[1]
        if accident == "job":
            slurm_site.call("scancel", "--signal=KILL", "--full", number)
        elif accident == "requeue":
            slurm_site.call("scontrol", "requeue", number)
        elif accident == "node":
            slurm_site.kill("slurmd")
            for pid in alive(f"slurmstepd: [{number}."):
                os.kill(pid, signal.SIGKILL)
            kill_supervisor(next(folder.glob("start-*")))
            until(lambda: "RUNNING" not in slurm_site.call("squeue", "--noheader", "--format=%T"), 90)
            slurm_site.start_node()
        elif accident == "controller":
            slurm_site.stop_controller()
            time.sleep(3)
            slurm_site.start_controller()
        else:
            done.kill()
            done.wait()
            done = campaign(tmp_path, "slurm", model, slurm_site)
        out = done.communicate(timeout=350)[0]
    if accident == "job":
        state = after_an_accident(tmp_path, out, done.returncode)
        assert state.results[run.id].fault == "infra" and "Slurm ended job" in state.results[run.id].message
    else:
        assert done.returncode == 0, out
        state = check_sound(tmp_path / "runs/n")
        assert merged_titles(state) == ["less smoothing"] and state.results[run.id].fault is None
        assert accident not in ("requeue", "node") or len(list(folder.glob("start-*"))) == 2


@pytest.mark.parametrize("engine", [pytest.param("ray", marks=ON_RAY), pytest.param("slurm", marks=ON_SLURM)])
def test_doctor_proves_an_engine_by_real_jobs(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    site = request.getfixturevalue(f"{engine}_site")
    tiny.write_tiny_target(tmp_path / "target")
    extra = site.environment if engine == "slurm" else {"RAY_ADDRESS": site.address}
    done = subprocess.run([sys.executable, "-m", "agent.cli", "doctor", "target", "--engine", engine, "--slots", "2"],
                          cwd=tmp_path, env=environment() | extra, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert done.stdout.count("ran and came home whole") == 2 and "a running job was ended" in done.stdout


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_node_that_comes_takes_the_place_of_a_lost_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    site = RaySite(nodes=1)
    try:
        ground = Ground(tmp_path, "ray", site)
        engine, folder = ground.engine, ground.world.folder
        engine.start(folder / "first", ground.job(ground.slow("x"), steps=200))
        assert engine.poll(folder / "first") is None
        site.kill(ground.device.split(":")[1])
        assert finished(engine, folder / "first").message.startswith("lost")
        engine.start(folder / "second", ground.job(ground.world.source()))
        assert engine.poll(folder / "second") is None
        site.add()
        assert finished(engine, folder / "second").fault is None
        engine.close()
    finally:
        site.stop()




def test_a_device_of_another_machine_is_told_from_a_cpu() -> None:
    assert [gpu.index(name) for name in ("cpu", "ray:ab12:cpu", "cuda", "cuda:3", "ray:ab12:cuda:3")] == [
        None, None, 0, 3, 3]
