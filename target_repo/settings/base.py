"""Editable: what can be set, and in which unit. Learning rates of AdamW groups are for a width of 768 and are
scaled by (width / 768) ** -0.5 (nanochat's rule)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    # model
    windows: tuple[float, ...]
    """Attention window of each layer as a share of the context; the pattern repeats, the last layer is always 1."""
    rope_base: float
    qk_scale: float
    """Multiplier on the normalised q and on the normalised k."""
    softcap: float
    """Logits are softcap * tanh(logits / softcap); 0: off."""
    value_embeddings: bool
    """Every other layer mixes a token's own value embedding into v."""
    gate_channels: int
    gate_scale: float
    # initialisation
    matrix_init: str
    """"fan_in": U(-s, s) with s = sqrt(3 / width); "normal": N(0, 0.02^2)."""
    embedding_std: float
    unembedding_std: float
    fc_init_scale: float
    residual_init: float
    skip_init: float
    """Initial weight of the embedding added again before each layer."""
    # optimizer
    embedding_lr: float
    value_embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    scalar_lr: float
    adam_betas: tuple[float, float]
    embedding_decay: float
    value_embedding_decay: float
    unembedding_decay: float
    matrix_decay: float
    momentum: float
    momentum_start: float
    momentum_steps: float
    """Steps over which the momentum rises, as a share of the run when below 1."""
    second_moment: float
    """beta2 of the per-row normalisation of Muon's update (NorMuon)."""
    # schedule
    warmup: float
    warmdown: float
    final_lr: float
    decay_schedule: str
    """Weight decay over the run: "constant", "linear" or "cosine" to 0."""
