"""Protected: answers a trusted scorer's questions about a trained model, over HARNESS_FD (frames in README.md).

The scorer, not this process, knows the held-out text and computes the score: it sends prefixes and takes the logits of
the next token, then whole rows and takes a loss for each token.
"""

import json
import os
import struct

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

from harness import Wire, prepare_device
from model import build_model


@torch.inference_mode()
def main() -> None:
    wire = Wire(int(os.environ["HARNESS_FD"]))
    spec = json.loads(wire.receive()[1])
    device, sequence = str(spec["device"]), int(spec["sequence"])
    prepare_device(device, int(spec["threads"]), 0)
    model = build_model(safetensors.torch.load(bytes(wire.receive()[1])), str(spec["preset"]), device)
    cuda = device.startswith("cuda")
    wire.send(b"R")
    while True:
        kind, raw = wire.receive()
        if kind == b"E":
            return
        if kind == b"A":
            rows, length = struct.unpack_from("<II", raw)
            ids = torch.from_numpy(np.frombuffer(raw, np.uint16, offset=8).astype(np.int64)).view(rows, length)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                answer = model(ids.to(device))[:, -1]
        else:
            ids = torch.from_numpy(np.frombuffer(raw, np.uint16).astype(np.int64)).view(-1, sequence + 1).to(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                logits = model(ids[:, :-1])
            answer = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        wire.send(kind, answer.float().cpu().numpy().tobytes())


if __name__ == "__main__":
    main()
