"""Editable: the model. A decoder-only transformer in the manner of nanochat: rotary positions, q and k normalised,
squared ReLU, no biases, untied embeddings, value embeddings on alternate layers, softcapped logits.

Shapes: B rows, T tokens, V vocabulary, C width, H heads, D head size. Token ids are int64 [B, T].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from presets import PRESETS, Preset
from settings import settings
from settings.base import Settings
from streams import normal_, uniform_


def norm(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square normalisation without a gain."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x [B, H, T, D] with cos and sin [T, D/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention over the last ``window`` tokens (the whole context when window >= T)."""

    def __init__(self, p: Preset, s: Settings, window: int, value_embedding: bool) -> None:
        super().__init__()
        self.heads, self.window, self.s = p.heads, window, s
        self.qkv = nn.Linear(p.width, 3 * p.width, bias=False)
        self.proj = nn.Linear(p.width, p.width, bias=False)
        self.gate = nn.Linear(s.gate_channels, p.heads, bias=False) if value_embedding else None

    def forward(self, x: torch.Tensor, ve: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.heads, -1) for t in self.qkv(x).split(C, dim=-1))
        if self.gate is not None and ve is not None:
            gate = self.s.gate_scale * torch.sigmoid(self.gate(x[..., : self.s.gate_channels]))
            v = v + gate.unsqueeze(-1) * ve.view(B, T, self.heads, -1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k = q * self.s.qk_scale, k * self.s.qk_scale
        if self.window >= T:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            age = torch.arange(T, device=x.device)[:, None] - torch.arange(T, device=x.device)[None, :]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < self.window))
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, p: Preset) -> None:
        super().__init__()
        self.fc = nn.Linear(p.width, 4 * p.width, bias=False)
        self.proj = nn.Linear(4 * p.width, p.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, p: Preset, s: Settings, window: int, value_embedding: bool) -> None:
        super().__init__()
        self.attention = Attention(p, s, window, value_embedding)
        self.mlp = MLP(p)

    def forward(self, x: torch.Tensor, ve: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class Model(nn.Module):
    """Token ids [B, T] to logits [B, T, V] in float32."""

    def __init__(self, p: Preset, s: Settings) -> None:
        super().__init__()
        self.p, self.s = p, s
        shares = [s.windows[i % len(s.windows)] for i in range(p.depth - 1)] + [1.0]
        with_value = [s.value_embeddings and i % 2 == (p.depth - 1) % 2 for i in range(p.depth)]
        self.embedding = nn.Embedding(p.vocab, p.width)
        self.value_embeddings = nn.ModuleDict(
            {str(i): nn.Embedding(p.vocab, p.width) for i in range(p.depth) if with_value[i]})
        self.blocks = nn.ModuleList(
            Block(p, s, math.ceil(shares[i] * p.sequence), with_value[i]) for i in range(p.depth))
        self.unembedding = nn.Linear(p.width, p.vocab, bias=False)
        self.residual_weights = nn.Parameter(torch.empty(p.depth))
        self.skip_weights = nn.Parameter(torch.empty(p.depth))
        self.register_buffer("cos", torch.empty(p.sequence, p.head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(p.sequence, p.head_dim // 2), persistent=False)

    def set_rotary_tables(self) -> None:
        p = self.p
        frequency = self.s.rope_base ** (-torch.arange(0, p.head_dim, 2, dtype=torch.float32) / p.head_dim)
        angle = torch.outer(torch.arange(p.sequence, dtype=torch.float32), frequency)
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def initialise(self, seed: int) -> None:
        """Set every parameter, each from its own stream of ``seed``. Memory is uninitialised before."""
        p, s = self.p, self.s
        self.set_rotary_tables()
        bound = math.sqrt(3 / p.width)
        normal_(self.embedding.weight, s.embedding_std, seed, "embedding")
        normal_(self.unembedding.weight, s.unembedding_std, seed, "unembedding")
        for name, table in self.value_embeddings.items():
            uniform_(table.weight, bound, seed, f"value_embedding.{name}")
        for i, block in enumerate(self.blocks):
            for name, weight, scale in (("qkv", block.attention.qkv.weight, 1.0),
                                        ("fc", block.mlp.fc.weight, s.fc_init_scale)):
                if s.matrix_init == "normal":
                    normal_(weight, 0.02 * scale, seed, f"{i}.{name}")
                else:
                    uniform_(weight, bound * scale, seed, f"{i}.{name}")
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.mlp.proj.weight)
            if block.attention.gate is not None:
                nn.init.zeros_(block.attention.gate.weight)
        nn.init.constant_(self.residual_weights, s.residual_init)
        nn.init.constant_(self.skip_weights, s.skip_init)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Normalised last hidden state [B, T, C]."""
        T = ids.size(1)
        # the residual stream is bfloat16 on a GPU: half the traffic of everything between two matrix products
        dtype = torch.bfloat16 if ids.is_cuda else torch.float32
        cos, sin = self.cos[:T].to(dtype), self.sin[:T].to(dtype)
        x = first = norm(self.embedding(ids).to(dtype))
        for i, block in enumerate(self.blocks):
            x = self.residual_weights[i].to(dtype) * x + self.skip_weights[i].to(dtype) * first
            ve = self.value_embeddings[str(i)](ids).to(dtype) if str(i) in self.value_embeddings else None
            x = block(x, ve, cos, sin)
        return norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in float32 of hidden states [..., C]."""
        out = self.unembedding(x).float()
        return self.s.softcap * torch.tanh(out / self.s.softcap) if self.s.softcap else out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(ids))

    def loss(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats of targets [B, T]."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())


def build(preset: str, seed: int, device: str) -> Model:
    """A model ready to train, float32 parameters."""
    with torch.device("meta"):
        model = Model(PRESETS[preset], settings(preset))
    model.to_empty(device=device)
    with torch.no_grad():
        model.initialise(seed)
    return model


def build_model(weights: dict[str, torch.Tensor], preset: str, device: str) -> Model:
    """The seam of the evaluation: a model with ``weights``, called with ids [B, T], gives logits [B, T, V]."""
    with torch.device("meta"):
        model = Model(PRESETS[preset], settings(preset))
    model.to_empty(device=device)
    with torch.no_grad():
        model.set_rotary_tables()
    model.load_state_dict(weights)
    return model.eval()
