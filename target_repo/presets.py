"""Protected: the dial. A preset is a size; everything that follows from it is here. Hyper-parameters are in settings/.

Frozen for a comparison: the text, the tokenizer, the context length and the seam. Covers sizes; does not cover how
a model of that size is built or trained, which is what a patch may change.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    name: str
    depth: int
    """Layers. The dial: width and heads follow from it."""
    head_dim: int
    vocab: int
    """Token ids, the separator included."""
    sequence: int
    """Tokens of context."""
    rows: int
    """Rows of a batch; rows x sequence tokens a step."""
    steps: int
    """Steps of a run by hand; a harness may grant another number."""
    corpus_mb: int
    """Megabytes of training text taken from this machine's Python source."""
    packages: bool
    """Take every installed package's source, not only the standard library's and torch's."""

    @property
    def width(self) -> int:
        return {2: 64, 3: 96, 4: 256, 8: 768, 12: 768}[self.depth]

    @property
    def heads(self) -> int:
        return self.width // self.head_dim


PRESETS = {
    "cpu": Preset("cpu", depth=2, head_dim=16, vocab=1024, sequence=128, rows=8,
                  steps=200, corpus_mb=24, packages=False),
    "mid": Preset("mid", depth=3, head_dim=16, vocab=1024, sequence=128, rows=8,
                  steps=500, corpus_mb=24, packages=False),
    "small": Preset("small", depth=4, head_dim=32, vocab=4096, sequence=512, rows=32,
                    steps=500, corpus_mb=48, packages=True),
    "h100": Preset("h100", depth=8, head_dim=128, vocab=8192, sequence=1024, rows=96,
                   steps=150, corpus_mb=120, packages=True),
    "d12": Preset("d12", depth=12, head_dim=128, vocab=8192, sequence=1024, rows=96,
                  steps=1000, corpus_mb=400, packages=True),
}
