"""The goal-keeper: what is turned away, and what must pass."""

from __future__ import annotations

import pytest

from agent import config
from agent.policy import Changed
from agent.scope import drift

BASE = '''import argparse, random, torch
STEPS = 200
WARMUP_STEPS = 20
SEED = 7
lr = 0.1
torch.manual_seed(SEED)

def schedule(step, steps=100):
    return min(1.0, step / WARMUP_STEPS)

def train(data="train.bin", eval_batches=8):
    for step in range(STEPS):
        pass
    print(f"val_loss: {0.5:.6f}")
    print("step", 3)

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
'''


def made(unit: str = "steps", tier: str = "reported") -> config.Config:
    sealed = '[data]\nprepare = "x"\n' if tier == "sealed" else ""
    return config.parse(
        f'[train]\ncommand = "python t.py {{seed}} {{{"seconds" if unit == "seconds" else "steps"}}}"\n'
        f'served = {str(tier == "sealed").lower()}\n{sealed}'
        f'[evaluate]\ntier = "{tier}"\ncommand = "python e.py"\npattern = \'val_loss: ([-+.\\w]+)\'\n'
        f'[budget]\nunit = "{unit}"\namount = 100\n[metric]\nname = "val_loss"\n', "x")


def said(old: str, new: str, **how: str) -> str:
    assert BASE.count(old) == 1
    return drift([Changed("t.py", BASE, BASE.replace(old, new))], made(**how))


@pytest.mark.parametrize(("old", "new", "why"), [
    ("STEPS = 200\nW", "STEPS = 400\nW", "how long it trains (STEPS = 400)"),
    ("STEPS = 200\nW", "STEPS = 200\nSTEPS *= 2\nW", "how long it trains (STEPS *= 2)"),
    ("steps=100", "steps=900", "how long it trains (steps = 900)"),
    ("default=3", "default=9", "how long it trains (epochs = 9)"),
    ("SEED = 7", "SEED = 42", "the seed (SEED = 42)"),
    ("torch.manual_seed(SEED)\n", "", "how random numbers are seeded"),
    ("lr = 0.1", "lr = 0.1\nrandom.seed(1)", "how random numbers are seeded"),
    ("eval_batches=8", "eval_batches=1", "what is evaluated (eval_batches = 1)"),
    ('print(f"val_loss: {0.5:.6f}")', 'print(f"val_loss: {0.4:.6f}")', "what it prints as val_loss"),
    ('print("step", 3)', 'print("val_loss: 0.1")', "what it prints as val_loss"),
    ('data="train.bin"', 'data="data/val.bin"', "names held-out data (data/val.bin)"),
])
def test_what_changes_the_question_is_turned_away_with_its_reason(old: str, new: str, why: str) -> None:
    assert said(old, new) == f"outside the objective: t.py changes {why}" or said(old, new).endswith(why)


@pytest.mark.parametrize(("old", "new"), [
    ("lr = 0.1", "lr = 0.2"),
    ("WARMUP_STEPS = 20", "WARMUP_STEPS = 40"),
    ("return min(1.0, step / WARMUP_STEPS)", "return min(1.0, (step + 1) / max(1, steps - 10))"),
    ("range(STEPS)", "range(int(STEPS))"),
    ("lr = 0.1", "lr = 0.1\nsteps = len(str(lr)) + max(1, 2)"),
    ('print("step", 3)', 'print("step", 4)'),
    ("lr = 0.1", 'lr = 0.1\ndata = "train_v2.bin"'),
])
def test_what_answers_the_question_passes(old: str, new: str) -> None:
    assert said(old, new) == ""


def test_rules_follow_the_tier_and_the_budget() -> None:
    assert said("STEPS = 200\nW", "STEPS = 400\nW", unit="seconds") == ""
    assert said('print(f"val_loss: {0.5:.6f}")', "pass", tier="sealed") == ""
    assert said("SEED = 7", "SEED = 8", tier="sealed")


def test_a_new_a_deleted_and_an_unreadable_file() -> None:
    assert drift([Changed("n.py", None, "STEPS = 3\n")], made())
    assert drift([Changed("n.py", "STEPS = 3\n", None), Changed("n.txt", "a", "seed = 1")], made()) == ""
    assert drift([Changed("n.py", "print 'old'\n", "lr = 1\n")], made()) == ""
