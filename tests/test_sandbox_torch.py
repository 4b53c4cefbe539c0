"""Slow: what training code really does with torch works inside every level, or fails there as the documents say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from sandbox_people import run_as, world_of
from sandbox_world import GOOD

from sandbox.job import Limits

pytestmark = pytest.mark.slow

TRAIN = r'''
import multiprocessing, os, sys, time
def child(connection):
    connection.send(("child", os.getpid() != os.getppid()))
def square(number):
    return number * number
def attempt(name, action):
    began = time.monotonic()
    try:
        print(name, "works", action(), flush=True)
    except BaseException as error:
        print(name, "fails", type(error).__name__, str(error).replace("\n", " ")[:300], flush=True)
    print(f"# {name} {time.monotonic() - began:.1f} s", flush=True)
def step():
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.weight.detach().clone()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.weight)
def loader():
    data = torch.utils.data.TensorDataset(torch.arange(64.0))
    return sum(float(batch[0].sum()) for batch in torch.utils.data.DataLoader(data, 8, num_workers=2))
def spawn():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    got = ours.recv()
    process.join()
    return got
def pool():
    with multiprocessing.get_context("spawn").Pool(2) as made:
        return made.map(square, [1, 2, 3])
def compiled():
    model = torch.compile(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()))
    return tuple(model(torch.randn(4, 8)).shape)
if __name__ == "__main__":
    attempt("import", lambda: __import__("torch").__version__)
    import torch
    attempt("step", step)
    attempt("spawn", spawn)
    attempt("pool", pool)
    attempt("loader", loader)
    if len(sys.argv) > 1:
        attempt("compile", compiled)
    import runpy
    runpy.run_path("good.py", run_name="good")
'''


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("who", "level"), [("root", 3), ("user", 2), ("root", 1), ("user", 1)])
def test_torch_works_inside(who: str, level: int) -> None:
    compiler = shutil.which("g++", path="/usr/bin:/bin") is not None
    with world_of(who) as world:
        job = world.job(world.source(TRAIN, good=GOOD), max_level=level,
                        command=("python", "train.py", *(["compile"] if compiler else [])),
                        limits=Limits(wall_seconds=600, memory_mb=6000, scratch_mb=1024))
        result = run_as(who, world, job, timeout=800)
        text = world.log()
        if result.level != level:
            pytest.skip(f"{who} cannot have level {level} here")
        assert result.fault is None, text
    said = dict(re.findall(r"^(\w+) (works|fails)", text, re.MULTILINE))
    needed = {"import", "step", "spawn", *(["compile"] if compiler else [])}
    # semaphores are files in /dev/shm, and tensors of workers come by sockets: level 1 has neither
    shared = {"pool", "loader"}
    works = {name for name, state in said.items() if state == "works"}
    assert works == needed | (shared if level >= 2 else set()), text


def test_the_documents_say_what_does_not_work_at_level_1() -> None:
    text = Path(__file__).resolve().parent.parent.joinpath("docs/isolation.md").read_text(encoding="utf-8")
    assert "num_workers" in text and "/dev/shm" in text
