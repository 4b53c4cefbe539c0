"""Editable: Muon for the matrices inside the blocks, AdamW for everything else.

Muon: the momentum of each matrix is made nearly orthogonal by five Polar Express steps (arXiv 2505.16932), then
normalised by row by a running second moment (NorMuon, arXiv 2510.05491), with cautious weight decay. Matrices of one
shape are stacked and stepped together.
"""

import torch
from torch import nn

from settings.base import Settings

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(g: torch.Tensor) -> torch.Tensor:
    """Nearly the orthogonal polar factor of each matrix of g [N, rows, columns]."""
    x = g.bfloat16() if g.is_cuda else g
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(g.dtype)


class AdamW:
    """Decoupled weight decay on Adam (arXiv 1711.05101), by torch's fused kernel.

    Not torch.optim.AdamW: the first Optimizer object of a process imports torch.compile's front end, 2 CPU-seconds,
    a tenth of a run on the cpu preset.
    """

    def __init__(self, groups: list[tuple[list[nn.Parameter], float, float]], betas: tuple[float, float]) -> None:
        """``groups`` holds (parameters, learning rate, weight decay)."""
        self.betas, self.groups = betas, [group for group in groups if group[0]]
        self.state = [[(torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)) for p in group[0]]
                      for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float, decay: float) -> None:
        """One step, with the schedule's multipliers of learning rate and weight decay."""
        for (parameters, lr, weight_decay), state in zip(self.groups, self.state, strict=True):
            live = [(p, s) for p, s in zip(parameters, state, strict=True) if p.grad is not None]
            if not live:
                continue
            ticks = [s[2] for _, s in live]
            torch._foreach_add_(ticks, 1)
            torch._fused_adamw_(
                [p for p, _ in live], [p.grad for p, _ in live], [s[0] for _, s in live], [s[1] for _, s in live], [],
                ticks, lr=lr * rate, beta1=self.betas[0], beta2=self.betas[1], weight_decay=weight_decay * decay,
                eps=1e-10, amsgrad=False, maximize=False)


class Muon:
    """Muon over stacks of matrices, one stack for each shape."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, beta2: float, decay: float) -> None:
        shapes = sorted({tuple(p.shape) for p in parameters})
        self.stacks = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.lr, self.beta2, self.decay = lr, beta2, decay
        self.state: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self, rate: float, decay: float, momentum: float) -> None:
        """One step, with the schedule's multipliers and momentum."""
        for number, parameters in enumerate(self.stacks):
            grads = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
            weights = torch.stack([p.detach() for p in parameters])
            if number not in self.state:
                self.state[number] = torch.zeros_like(grads), torch.zeros_like(grads[..., :1])
            velocity, second = self.state[number]
            muon_step(weights, grads, velocity, second, self.lr * rate, momentum, self.beta2, self.decay * decay)
            torch._foreach_copy_([p.detach() for p in parameters], list(weights.unbind(0)))


def muon_step(weights: torch.Tensor, grads: torch.Tensor, velocity: torch.Tensor, second: torch.Tensor,
              lr: float, momentum: float, beta2: float, decay: float) -> None:
    """Step stacked weights [N, rows, columns] in place. ``second`` [N, rows, 1] is the row-wise second moment."""
    velocity.lerp_(grads, 1 - momentum)
    update = orthogonalise(grads.lerp(velocity, momentum))
    row = update.float().square().mean(-1, keepdim=True)
    before = row.sum((-2, -1), keepdim=True)
    second.lerp_(row, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    after = (row * scale.square()).sum((-2, -1), keepdim=True)
    update = update * (scale * (before / after.clamp_min(1e-10)).sqrt()).to(update.dtype)
    lr = lr * max(1.0, weights.size(-2) / weights.size(-1)) ** 0.5
    agree = (update * weights) >= 0
    weights.sub_(lr * update.to(weights.dtype) + lr * decay * weights * agree)


def optimizers(model: nn.Module, s: Settings) -> tuple[AdamW, Muon]:
    """The two optimizers over all parameters of ``model``."""
    scale = (model.p.width / 768) ** -0.5
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and min(p.shape) >= 16]
    known = {id(p) for p in matrices}
    tables = list(model.value_embeddings.parameters())
    small = [p for p in (*model.blocks.parameters(), model.residual_weights, model.skip_weights) if id(p) not in known]
    adamw = AdamW([
        ([model.embedding.weight], s.embedding_lr * scale, s.embedding_decay),
        (tables, s.value_embedding_lr * scale, s.value_embedding_decay),
        ([model.unembedding.weight], s.unembedding_lr * scale, s.unembedding_decay),
        (small, s.scalar_lr, 0.0),
    ], s.adam_betas)
    return adamw, Muon(matrices, s.matrix_lr, s.second_moment, s.matrix_decay)
