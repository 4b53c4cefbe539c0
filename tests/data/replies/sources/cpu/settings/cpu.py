"""Editable: the cpu preset, for two bare cores. Several of these choices are not good ones; see README.md."""

from settings.base import Settings

SETTINGS = Settings(
    # model
    windows=(1.0, 1.0),
    rope_base=10_000.0,
    qk_scale=1.0,
    softcap=15.0,
    value_embeddings=True,
    gate_channels=16,
    gate_scale=2.0,
    # initialisation
    matrix_init="fan_in",
    embedding_std=1.0,
    unembedding_std=0.001,
    fc_init_scale=4.0,
    residual_init=1.0,
    skip_init=0.1,
    # optimizer
    embedding_lr=0.3,
    value_embedding_lr=0.3,
    unembedding_lr=0.002,
    matrix_lr=0.16,
    scalar_lr=0.05,
    adam_betas=(0.95, 0.95),
    embedding_decay=0.0,
    value_embedding_decay=0.0,
    unembedding_decay=0.0,
    matrix_decay=0.1,
    momentum=0.95,
    momentum_start=0.85,
    momentum_steps=0.3,
    second_moment=0.95,
    # schedule
    warmup=0.0,
    warmdown=0.75,
    final_lr=0.0,
    decay_schedule="constant",
)
