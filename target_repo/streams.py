"""Protected: one named random stream for each tensor.

A run's seed and a tensor's name fix its initial values, whatever other tensors exist and in whatever order they are
made. A patch that adds a tensor leaves all others as they were, so two runs with one seed differ by the patch alone.
"""

import hashlib

import torch


def stream(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Generator for the tensor called ``name``; the same in every process on one kind of device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def normal_(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fill ``tensor`` (any shape and dtype) from N(0, std^2)."""
    draw = torch.randn(tensor.shape, generator=stream(seed, name, tensor.device), device=tensor.device)
    tensor.copy_(draw * std)


@torch.no_grad()
def uniform_(tensor: torch.Tensor, bound: float, seed: int, name: str) -> None:
    """Fill ``tensor`` from U(-bound, bound)."""
    draw = torch.rand(tensor.shape, generator=stream(seed, name, tensor.device), device=tensor.device)
    tensor.copy_((draw * 2 - 1) * bound)
