"""Editable: the training loop.

    python train.py --preset cpu            # by hand, after prepare.py: a progress bar and a falling loss

The harness (protected) owns the seed, the data order and the number of steps, and takes the weights; under a harness
process the same file runs unchanged.
"""

import torch

import harness
import schedule
from model import build
from optim import optimizers
from settings import settings


def train(run: harness.Harness) -> torch.nn.Module:
    """Train for ``run.steps`` batches and return the model."""
    s = settings(run.preset)
    model = build(run.preset, run.seed, run.device)
    adamw, muon = optimizers(model, s)
    cuda = run.device.startswith("cuda")
    loss_of = torch.compile(model.loss, dynamic=False) if cuda else model.loss
    step = 0
    while (batch := run.batch()) is not None:
        ids, targets = batch
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = loss_of(ids, targets)
        loss.backward()
        rate, decay = schedule.learning_rate(step, run.steps, s), schedule.weight_decay(step, run.steps, s)
        adamw.step(rate, decay)
        muon.step(rate, decay, schedule.momentum(step, run.steps, s))
        model.zero_grad(set_to_none=True)
        step += 1
        run.report(step, loss)
    return model


if __name__ == "__main__":
    run = harness.connect()
    run.finish(train(run))
