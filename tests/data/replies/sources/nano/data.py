"""Protected: the text, and the loss on what was held out."""

import torch


def batches(batch_size, count):
    ...


@torch.no_grad()
def val_loss(model):
    ...
