"""Protected: bits per byte of weights on one split, for a run by hand.

    python evaluate.py --preset cpu --split val out/cpu.safetensors

A harness that trusts nobody scores through serve.py instead.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

from model import build_model
from presets import PRESETS


@torch.inference_mode()
def bits_per_byte(weights: dict[str, torch.Tensor], preset: str, device: str, data: Path, split: str,
                  rows: int = 256) -> float:
    """Bits per UTF-8 byte over ``rows`` rows spread evenly over data/SPLIT.bin; the separator is not scored."""
    sequence = PRESETS[preset].sequence
    tokens = np.fromfile(data / f"{split}.bin", np.uint16).astype(np.int64)
    length = torch.from_numpy(np.load(data / "token_bytes.npy").astype(np.int64))
    model = build_model(weights, preset, device)
    nats, total = 0.0, 0
    whole = len(tokens) // (sequence + 1)
    table = tokens[: whole * (sequence + 1)].reshape(whole, sequence + 1)
    count = min(rows, whole * 2 // 3)
    for some in np.array_split(np.arange(count) * whole // count, -(-count // 16)):
        ids = torch.from_numpy(table[some])
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            logits = model(ids[:, :-1].to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="none").cpu()
        size = length[ids[:, 1:].flatten()]
        nats += float(loss[size > 0].double().sum())
        total += int(size.sum())
    return nats / math.log(2) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--split", choices=["val", "confirm", "final"], default="val")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    weights = safetensors.torch.load_file(args.weights)
    data = args.data or Path("data") / args.preset
    print(f"{args.split}_bpb {bits_per_byte(weights, args.preset, args.device, data, args.split):.4f}")


if __name__ == "__main__":
    main()
