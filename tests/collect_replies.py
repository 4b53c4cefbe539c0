"""Asks the small model for edits with Ratchet's own prompts, and keeps its raw replies for tests/test_replies.py.

    python -m tests.collect_replies BASE_URL MODEL OUT.jsonl MINUTES [SKIP]

One line a reply: where it came from (model, source, way of asking, temperature), and the text as it came. Sources are
the folders of tests/data/replies/sources. Ways: the modes of agent/llm/edit_modes.py, and ``json, unconstrained``,
which asks for JSON without a response format, as an endpoint that knows none would be asked. Labels are not made here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from agent import config
from agent.llm.edit_modes import EXPECTED, Mode
from agent.llm.endpoint import Endpoint
from agent.llm.messages import Prompts, schema
from agent.read import Briefing, HistoryLine

HERE = Path(__file__).parent
SOURCES = HERE / "data" / "replies" / "sources"
WAYS = ("json, unconstrained", "blocks", "diff", "files", "json", "anchored")
TITLES = ("Raise the learning rate", "Use Adam instead of SGD", "Add a warm-up", "Make the model wider",
          "Use a cosine schedule", "Lower the learning rate", "Add momentum", "Initialise to zero")


def source_files(name: str) -> dict[str, str]:
    """Path -> text, with the line ends that are on the disk."""
    folder = SOURCES / name
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in sorted(folder.rglob("*.py"))}


def briefing(name: str, chance: random.Random) -> Briefing:
    """A briefing on a source, with a few made-up attempts of history so that the questions differ."""
    files = source_files(name)
    protected = {path: text for path, text in files.items() if path == "data.py"}
    history = tuple(HistoryLine(f"{number:03d}", title, "rejected", "judge", "no gain")
                    for number, title in enumerate(chance.sample(TITLES, chance.randint(0, 3)), 1))
    return Briefing(
        tip="c0ffee", number=len(history) + 1, files={path: files[path] for path in files if path not in protected},
        protected=protected, editable=tuple(path for path in files if path not in protected),
        max_patch_lines=60, metric="val_loss", direction="min", budget="300 steps", tier="protected", calibration="",
        history=history, preset="", attempts_left=20, tokens=6000)


def main(base: str, name: str, out: Path, minutes: float, skip: int) -> None:
    chance, ends = random.Random(1), time.monotonic() + 60 * minutes
    prompts = Prompts(HERE.parent / "prompts")
    names = ("regression", "line", "tiny", "windows", "tabs", "nano", "cpu")
    for number, (source, way) in enumerate(itertools.cycle(itertools.product(names, WAYS)), 1):
        if time.monotonic() > ends:
            return
        temperature = chance.choice((0.3, 0.7, 1.0))
        model = config.Model(name=name, max_tokens=700, temperature=temperature, timeout_seconds=400, attempts=1)
        mode: Mode = next((one for one in EXPECTED if one == way), "json")
        told = briefing(source, chance)
        if number <= skip:
            continue
        asked: dict[str, Any] = {} if way not in EXPECTED else schema(told, mode)
        messages = prompts.opening(told, 0, mode)
        reply = Endpoint(model, "none", base, name).complete(messages, asked)
        line = {"id": f"model-{number:03d}", "model": name, "source": source, "asked": way, "temperature": temperature,
                "history": [one.title for one in told.history], "cut": reply.cut,
                "prompt": hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16],
                "tokens": [reply.cost.prompt_tokens, reply.cost.completion_tokens], "reply": reply.text}
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(number, source, way, f"{reply.cost.seconds:.0f} s", reply.cost.prompt_tokens,
              reply.cost.completion_tokens, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]) if len(sys.argv) > 5 else 0)
