"""Trains the small GPT on bytes."""

import math

import torch

from data import batches, val_loss
from model import GPT, GPTConfig

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 2000
weight_decay = 0.1
beta1, beta2 = 0.9, 0.95
grad_clip = 1.0
batch_size = 16  # sequences a step


def get_lr(it):
    # linear warmup
    if it < warmup_iters:
        return learning_rate * (it + 1) / warmup_iters
    # cosine decay
    ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def main():
    model = GPT(GPTConfig())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        betas=(beta1, beta2),
        weight_decay=weight_decay,
    )
    for it, (x, y) in enumerate(batches(batch_size, max_iters)):
        for group in optimizer.param_groups:
            group["lr"] = get_lr(it)
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        if it % 100 == 0:
            print(f"iter {it}: loss {loss.item():.4f}")
    print(f"val: {val_loss(model):.4f}")


if __name__ == "__main__":
    main()
