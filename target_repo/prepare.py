"""Protected: makes the training and held-out tokens, once, outside any box.

    python prepare.py --preset cpu --out data/cpu
    python prepare.py --preset h100 --source fineweb --shards 2      # with network, and pip install 'lossratchet[data]'

The default text needs no network: the Python source that is on this machine anyway. Four splits, by hash of a file's
content: train, and three held-out ones (val selects, confirm certifies, final reports). Held-out files are chosen
among those that a training process never imports and are listed in meta.json under ``hidden``, so that a harness
can hide them from the code it runs. A training file that shares much text with a held-out one is dropped.

Writes to --out: {train,val,confirm,final}.bin (uint16 token ids, files joined by the separator), token_bytes.npy
(uint8: UTF-8 bytes of each id, 0 for the separator), tokenizer.json, meta.json (corpus hash, sizes, hidden files).
Does not cover: cleaning of the text, or near-duplicates inside the training split (harmless to a comparison).
"""

import argparse
import base64
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from presets import PRESETS, Preset

HELD_OUT = ("final", "confirm", "val")
HELD_OUT_BYTES = 600_000
"""Bytes of each held-out split, at least (a little more, since files are taken whole)."""
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
LIBRARY_HELD_OUT = (
    "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "msilib", "xmlrpc", "wsgiref", "curses", "dbm",
    "sqlite3", "venv", "pydoc_data",
)
"""Parts of the standard library that training never needs, even late: only these may be held out."""
TORCH_HELD_OUT = (
    "onnx", "testing/_internal", "ao", "package", "contrib", "distributed/elastic", "distributed/rpc",
    "distributed/pipelining", "distributed/checkpoint", "distributed/flight_recorder", "distributed/_shard",
    "distributed/_tools", "distributed/benchmarks", "distributed/fsdp",
)
NEEDED_LATE = (
    "torch", "triton", "numpy", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec",
    "safetensors", "packaging", "typing_extensions", "setuptools", "pip", "cuda", "nvidia", "pynvml", "psutil", "rich",
    "scipy", "functorch", "torchgen", "optree", "einops", "tqdm", "dill", "yaml",
)
"""Packages of which torch may import more in the middle of a run: never held out. Of torch itself the parts above may
be, where it is all the text there is: a preset that takes every package leaves torch alone, since a GPU's compiler
imports even ``torch.distributed.checkpoint``."""
SHINGLE = 3
"""Consecutive non-trivial lines that make one shingle of the overlap check."""
OVERLAP = 0.2
"""A training document with a larger share of its shingles in a held-out document is dropped."""

# ---------------------------------------------------------------------------------------------------------- documents


def imported_files() -> set[str]:
    """Files that a training process imports: these can't be hidden from it, so they are never held out."""
    probe = (
        "import sys, numpy, safetensors.torch, torch, torch.nn.functional, torch.optim, torch.nn.attention\n"
        "import torch._dynamo, torch._inductor.compile_fx, torch._inductor.utils, torch.utils.data, asyncio\n"
        "if torch.cuda.is_available():\n"
        "    x = torch.ones(64, 64, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "    torch.compile(lambda y: torch.nn.functional.gelu(y @ y).sum())(x).backward()\n"
        "print('\\n'.join(m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)))\n"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return {os.path.realpath(line) for line in out.stdout.splitlines()}


def source_files(preset: Preset) -> Iterator[tuple[Path, bool]]:
    """(file, may it be held out) of this machine's Python source: the standard library without its tests, and
    torch's own source, or every installed package's."""
    imported = imported_files()
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = {Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
    roots = [library]
    for place in sorted(packages):
        roots.append(place if preset.packages else place / "torch")
    seen: set[str] = set()
    for root in roots:
        for folder, names, files in os.walk(root):
            names[:] = sorted(n for n in names if n not in ("test", "tests", "__pycache__", "site-packages",
                                                            "dist-packages", "_vendor", "config-3"))
            for name in sorted(files):
                path = os.path.realpath(Path(folder, name))
                if name.endswith(".py") and path not in seen:
                    seen.add(path)
                    free = may_hide(Path(folder), library, packages, torch_too=not preset.packages)
                    yield Path(path), path not in imported and free


def may_hide(folder: Path, library: Path, packages: set[Path], torch_too: bool) -> bool:
    """Whether code in ``folder`` can be hidden from a training process without breaking it or a sensible patch."""
    for place in packages:
        if folder.is_relative_to(place):
            inside = folder.relative_to(place)
            if inside.parts[:1] == ("torch",):
                return torch_too and any(inside.is_relative_to(Path("torch", part)) for part in TORCH_HELD_OUT)
            return bool(inside.parts) and inside.parts[0] not in NEEDED_LATE
    return folder.is_relative_to(library) and folder.relative_to(library).parts[:1] in [(n,) for n in LIBRARY_HELD_OUT]


def local_documents(preset: Preset) -> Iterator[tuple[str, str, bool]]:
    """(path, text, may be held out) of each readable source file of 400 bytes or more."""
    for path, free in source_files(preset):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= 400:
            yield str(path), text, free


def shard_documents(source: str, shards: int) -> Iterator[tuple[str, str, bool]]:
    """Documents of FineWeb-Edu or ClimbMix parquet shards from the Hugging Face hub. Needs network."""
    import pyarrow.parquet as parquet
    from huggingface_hub import HfApi, hf_hub_download

    repo = {"fineweb": "HuggingFaceFW/fineweb-edu", "climbmix": "karpathy/climbmix-400b-shuffle"}[source]
    names = sorted(n for n in HfApi().list_repo_files(repo, repo_type="dataset") if n.endswith(".parquet"))
    sample = [n for n in names if "sample/10BT" in n] or names
    for name in sample[:shards]:
        table = parquet.ParquetFile(hf_hub_download(repo, name, repo_type="dataset"))
        for group in range(table.num_row_groups):
            for number, text in enumerate(table.read_row_group(group, columns=["text"])["text"].to_pylist()):
                yield f"{name}#{group}.{number}", text, True


# ------------------------------------------------------------------------------------------------------------- splits


def shingles(text: str) -> set[int]:
    """Hashes of each run of SHINGLE consecutive lines, trivial lines left out."""
    lines = [line for line in map(str.strip, text.split("\n")) if len(line) > 12]
    return {hash("\n".join(lines[i:i + SHINGLE])) for i in range(len(lines) - SHINGLE + 1)}


def split(documents: Iterator[tuple[str, str, bool]], train_bytes: int) -> tuple[dict[str, list[str]], list[str], str]:
    """(documents of each split, paths of the held-out files, corpus hash).

    Exact duplicates are dropped. In order of content hash, documents of moderate size that may be held out fill
    final, confirm and val; the rest is training text, up to ``train_bytes``, less what overlaps.
    """
    unique: dict[str, tuple[str, str, bool]] = {}
    for path, text, free in documents:
        digest = hashlib.sha256(text.encode()).hexdigest()
        known = unique.get(digest)
        # two copies of one text: if either must stay readable, neither is held out
        unique[digest] = (path, text, free and known is None)
    ordered = [unique[digest] for digest in sorted(unique)]
    splits: dict[str, list[str]] = {name: [] for name in (*HELD_OUT, "train")}
    hidden: list[str] = []
    held: set[int] = set()
    sizes = dict.fromkeys(HELD_OUT, 0)
    rest: list[tuple[str, str, bool]] = []
    for path, text, free in ordered:
        want = next((name for name in HELD_OUT if sizes[name] < HELD_OUT_BYTES), None)
        if want is None or not free or not 800 <= len(text) <= 40_000:
            rest.append((path, text, free))
            continue
        own = shingles(text)
        if overlap(own, held):
            hidden.append(path)  # a near-copy of held-out text must not be readable either
            continue
        held |= own
        splits[want].append(text)
        sizes[want] += len(text.encode())
        hidden.append(path)
    total = 0
    for path, text, free in rest:
        if overlap(shingles(text), held):
            if free:
                hidden.append(path)
        elif total < train_bytes:
            splits["train"].append(text)
            total += len(text.encode())
    short = [name for name in HELD_OUT if sizes[name] < HELD_OUT_BYTES]
    if short:
        sys.exit(f"prepare: too little text on this machine for {', '.join(short)}; use --source with network")
    digest = hashlib.sha256()
    for name in sorted(splits):
        for text in splits[name]:
            digest.update(hashlib.sha256(text.encode()).digest())
    return splits, hidden, digest.hexdigest()[:16]


def overlap(own: set[int], held: set[int]) -> bool:
    return bool(own) and len(own & held) > OVERLAP * len(own)


# ------------------------------------------------------------------------------------------------------------- tokens


def train_tokenizer(texts: list[str], vocab: int, budget: int = 12_000_000) -> tiktoken.Encoding:
    """Byte-pair encoding of ``vocab - 1`` ranks, and one separator, learned from the first ``budget`` characters."""
    sample, size = [], 0
    for text in texts:
        sample.append(text)
        size += len(text)
        if size > budget:
            break
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(sample), vocab - 1, pattern=PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return tiktoken.Encoding("corpus", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|bos|>": vocab - 1})


def encode(encoding: tiktoken.Encoding, texts: list[str]) -> np.ndarray:
    """uint16 ids of all texts, each led by the separator."""
    bos = encoding.n_vocab - 1
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 512):
        for row in encoding.encode_ordinary_batch(texts[start:start + 512], num_threads=os.cpu_count() or 1):
            ids.append(np.array([bos, *row], dtype=np.uint16))
    return np.concatenate(ids) if ids else np.zeros(0, np.uint16)


def write(out: Path, splits: dict[str, list[str]], preset: Preset, facts: dict[str, object]) -> None:
    """All files of ``out``; meta.json comes last, so a folder with meta.json is whole."""
    out.mkdir(parents=True, exist_ok=True)
    encoding = train_tokenizer(splits["train"], preset.vocab)
    tokens = {}
    for name, texts in splits.items():
        ids = encode(encoding, texts)
        ids.tofile(out / f"{name}.bin")
        tokens[name] = len(ids)
    ranks = encoding._mergeable_ranks
    lengths = np.zeros(preset.vocab, np.uint8)
    for token, rank in ranks.items():
        lengths[rank] = len(token)
    np.save(out / "token_bytes.npy", lengths)
    table = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
    (out / "tokenizer.json").write_text(json.dumps({"pattern": PATTERN, "vocab": preset.vocab, "ranks": table}))
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in splits.items()}
    facts |= {"tokens": tokens, "bytes": sizes, "documents": {n: len(t) for n, t in splits.items()}}
    partial = out / "meta.json.tmp"
    partial.write_text(json.dumps(facts, indent=1))
    partial.replace(out / "meta.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu")
    parser.add_argument("--out", type=Path, help="default: data/PRESET")
    parser.add_argument("--source", choices=["local", "fineweb", "climbmix"], default="local")
    parser.add_argument("--shards", type=int, default=1, help="parquet shards to take with --source")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    out = args.out or Path("data") / preset.name
    documents = local_documents(preset) if args.source == "local" else shard_documents(args.source, args.shards)
    splits, hidden, corpus = split(documents, preset.corpus_mb * 1_000_000)
    write(out, splits, preset, {
        "preset": preset.name, "source": args.source, "corpus": corpus, "vocab": preset.vocab,
        "sequence": preset.sequence, "rows": preset.rows,
        "hidden": hidden if args.source == "local" else [],
    })
    print((out / "meta.json").read_text() if len(hidden) < 8 else
          f"{out}: corpus {corpus}, {len(splits['train'])} training and {len(hidden)} held-out files")


if __name__ == "__main__":
    main()
