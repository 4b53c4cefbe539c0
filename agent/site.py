"""Site: everything that stays fixed for the length of a campaign, and how a campaign's folder is opened.

    runs/<name>/ledger.jsonl     decisions (ledger.py)
    runs/<name>/repo.git         the campaign's own bare clone; ``accepted`` is the branch that merges move
    runs/<name>/source/<tree>/   a tree's files as the box sees them; can be deleted and is made again
    runs/<name>/jobs/<run>/      one job folder a run (sandbox/job.py)
    runs/.data/<key>/            prepared tokens, shared by the campaigns of one target and machine
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from agent import config as configuration
from agent import data_sums, git, git_trees
from agent.config import Config
from agent.errors import UserError
from sandbox import gpu

SPLITS = ("val", "confirm", "final")


@dataclass(frozen=True, slots=True)
class Data:
    """Prepared tokens of a served target. ``hidden``: files that hold held-out text and must not be seen in a box."""

    folder: Path
    corpus: str
    vocab: int
    rows: int
    sequence: int
    hidden: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a campaign works, and with what."""

    folder: Path
    prefix: str
    """The target's folder inside the repository; empty: all of it."""
    start: str
    config: Config
    data: Data | None
    devices: tuple[str, ...]
    """One entry a slot: ``cpu``, ``cuda:N`` or ``cuda:N+M``; on another machine ``ray:NODE:cpu`` or
    ``ray:NODE:cuda:N``."""
    level: int
    """Highest isolation level to use."""
    seed: int
    least_level: int = 0
    """Lowest one that code which nobody has read may run at."""

    @property
    def repo(self) -> Path:
        return self.folder / "repo.git"

    @property
    def on_gpus(self) -> bool:
        """Whether runs use GPUs: then seconds are charged as they pass, and a seed belongs to one device."""
        return gpu.index(self.devices[0]) is not None

    def source(self, commit: str) -> Path:
        """The target's files at ``commit``, written once per tree."""
        tree = git.resolve(self.repo, f"{commit}^{{tree}}", "tree") or commit
        place = self.folder / "source" / tree[:16]
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            git_trees.materialise(self.repo, tree, self.prefix, place)
        return place

    def texts(self, commit: str) -> tuple[dict[str, str], dict[str, str]]:
        """(editable, protected) text files at ``commit``, by path relative to the target."""
        source = self.config.source
        everything = git_trees.read_files(self.repo, commit, self.prefix, source.editable)
        protected = git_trees.read_files(self.repo, commit, self.prefix, source.protected) if source.protected else {}
        return {path: text for path, text in everything.items() if not git.matches(path, source.protected)}, protected


    def guidance(self) -> str:
        """The owner's words to a model, from the start commit: a patch cannot change them."""
        name = self.config.model.guidance
        return git_trees.read_files(self.repo, self.start, self.prefix, [name]).get(name, "") if name else ""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the code of a campaign comes from."""

    target: Path
    toplevel: str
    """The user's repository; empty when the target lies in none."""
    prefix: str
    start: str
    previous: str = ""
    """Campaign from whose accepted tip this one goes on."""


def locate(target: Path, packaged: bool) -> Origin:
    """The target's repository, folder and head. ``packaged``: the target that comes with ratchet, which may lie in
    no repository. Raises UserError."""
    try:
        place = git.locate(target)
    except UserError:
        if not packaged:
            raise
        return Origin(target, "", "", "")
    return Origin(target, str(place.toplevel), place.prefix, place.head)


def clone(origin: Origin, folder: Path, continued: Path | None, tip: str) -> Origin:
    """Make the campaign's own bare clone in ``folder`` and set its accepted branch. Returns the origin with its start.

    ``continued`` is the folder of a finished campaign on the same start whose ``tip`` is taken over.
    """
    repo = folder / "repo.git"
    if continued is not None:
        git.clone_bare(continued / "repo.git", repo, tip, source_bare=True)
        origin = Origin(origin.target, origin.toplevel, origin.prefix, tip, continued.name)
    elif origin.toplevel:
        git.clone_bare(Path(origin.toplevel), repo, origin.start)
    else:
        start = git_trees.import_folder(origin.target, repo)
        origin = Origin(origin.target, "", "", start)
    git.update_ref(repo, git.ACCEPTED, origin.start, None)
    return origin


def read_config(repo: Path, commit: str, prefix: str, preset: str, gpus: int) -> Config:
    """ratchet.toml at ``commit``, with the preset asked for, the file's own, or the one that fits the machine."""
    text = git_trees.read_files(repo, commit, prefix, [configuration.FILE]).get(configuration.FILE)
    if text is None:
        raise UserError(f"No {configuration.FILE} is committed in the target.",
                        f"Write and commit one; the least is:  {configuration.LEAST}")
    config = configuration.parse(text, configuration.FILE, preset)
    if config.preset or not config.presets:
        return config
    wanted = "h100" if gpus else "cpu"
    chosen = wanted if wanted in config.presets else next(iter(config.presets))
    return configuration.parse(text, configuration.FILE, chosen)


def find_devices(config: Config, slots: int | None) -> tuple[str, ...]:
    """One slot a GPU (``gpus``), or a group of them (``train.gpus_per_run``), where there are any and the preset is not
    ``cpu``; else one slot for each set of CPU threads.

    ``train.jobs_per_gpu``, and more ``slots`` than GPUs, share them: for jobs that leave a GPU idle and fit in its
    memory side by side. Raises UserError where a group cannot be made, or not of GPUs of one kind.
    """
    numbers = () if config.preset == "cpu" else gpus()
    if numbers:
        groups = _groups(numbers, config.train.gpus_per_run)
        return tuple(groups[i % len(groups)] for i in range(slots or len(groups) * config.train.jobs_per_gpu))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ("cpu",) * (slots or max(1, min(8, cores // config.train.threads)))


def _groups(numbers: Sequence[int], size: int) -> list[str]:
    """Devices of ``size`` GPUs each, neighbours together. Raises UserError."""
    if size > len(numbers):
        raise UserError(f"train.gpus_per_run is {size}, and this machine has {len(numbers)} GPU(s) for ratchet.",
                        "Set it to what there is, or run on a machine with more.")
    groups = ["cuda:" + "+".join(map(str, numbers[first:first + size]))
              for first in range(0, len(numbers) - size + 1, size)]
    for group in groups:
        kinds = {card.name for card in gpu.cards(group)}
        if len(kinds) > 1:
            raise UserError(f"train.gpus_per_run would put {' and '.join(sorted(kinds))} into one run ({group}).",
                            "Leave GPUs of one kind in CUDA_VISIBLE_DEVICES, or set train.gpus_per_run = 1.")
    return groups


def gpus() -> tuple[int, ...]:
    """Numbers, as nvidia-smi counts, of the GPUs that the driver shows and ``CUDA_VISIBLE_DEVICES`` leaves; as in CUDA
    that may name numbers or beginnings of UUIDs, and what follows an unknown name is not there.

    Raises UserError where it names a slice of a GPU, and where none of the GPUs answers: a night on the CPU instead
    would be no use to anybody who has one.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards, silent = ([], 0) if wanted in ("", "-1") else gpu.found()
    if silent and not cards:
        raise UserError(f"The driver lists {silent} GPU(s), and none answers nvidia-smi.",
                        "See nvidia-smi; a restart of the machine usually mends it. To train on the CPU, set "
                        "CUDA_VISIBLE_DEVICES to nothing.")
    if wanted is None or not cards:
        return tuple(card.index for card in cards)
    left: list[int] = []
    for word in (part.strip() for part in wanted.split(",")):
        if word.startswith("MIG-"):
            raise UserError(f"CUDA_VISIBLE_DEVICES names {word}, a slice of a GPU, which ratchet cannot give to a job.",
                            "Name whole GPUs in it, or set it to nothing to train on the CPU.")
        fit = [card.index for card in cards if word and (word == str(card.index) or (
            word.startswith("GPU-") and card.uuid.startswith(word)))]
        if len(fit) != 1 or fit[0] in left:
            break
        left += fit
    return tuple(left)


def prepare(config: Config, source: Path, cache: Path, say: Callable[[str], None]) -> Data | None:
    """Run ``data.prepare`` of the start commit once, outside any box (it is the owner's code), and read its meta.json.

    The result is kept under ``cache`` by a key over the command, the code, Python and torch. Raises UserError when
    it fails or leaves something out.
    """
    if not config.data.prepare:
        return None
    place = cache / _key(config, source)
    damaged = data_sums.broken(place)
    if damaged:
        say(f"{place / damaged} is damaged: the data are prepared again")
        data_sums.discard(place)
    if not (place / "meta.json").exists():
        say("preparing data (once for this machine)")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="new-") as temporary:
            out = Path(temporary) / "out"
            _run_prepare(config, source, out)
            if not (out / "meta.json").exists():
                raise UserError(f"data.prepare wrote no meta.json to {{out}} ({config.data.prepare}).",
                                "It must write train.bin, val.bin, confirm.bin, final.bin, token_bytes.npy, meta.json.")
            data_sums.seal(out)
            if not place.exists():
                out.rename(place)
    try:
        meta = json.loads((place / "meta.json").read_text())
        return Data(place, str(meta["corpus"]), int(meta["vocab"]), int(meta["rows"]), int(meta["sequence"]),
                    tuple(meta.get("hidden", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place / 'meta.json'} lacks {error}.",
                        "data.prepare must give corpus, vocab, rows, sequence and hidden.") from error


def _run_prepare(config: Config, source: Path, out: Path) -> None:
    words = [word.replace("{out}", str(out)).replace("{preset}", config.preset)
             for word in shlex.split(config.data.prepare)]
    if words[0] in ("python", "python3"):
        words[0] = sys.executable
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR",
                                                                                  "PYTHONPATH", "LD_LIBRARY_PATH")}
    done = subprocess.run(words, cwd=source, env=environment | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode and shutil.disk_usage(out.parent).free < 1 << 18:  # numpy says it in words of its own
        raise UserError(f"The disk is full at {out.parent.parent}.",
                        "Free some (`ratchet gc` removes old runs), then run the same command again.")
    if done.returncode:
        tail = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
        raise UserError(f"data.prepare failed ({config.data.prepare}): {tail[0]}.", f"Run it by hand in {source}.")


def _key(config: Config, source: Path) -> str:
    digest = hashlib.sha256(repr((config.data.prepare, config.preset, sys.version, sys.prefix,
                                  _version("torch"))).encode())
    for path in sorted(source.rglob("*.py")):
        if git.matches(str(path.relative_to(source)), config.source.protected):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def until_time(text: str | None, now: datetime.datetime) -> datetime.datetime | None:
    """The next moment that ``07:00`` (local) or an ISO date and time names. Raises UserError."""
    if not text:
        return None
    try:
        if len(text) <= 5:
            clock = datetime.time.fromisoformat(text if len(text) == 5 else "0" + text)
            local = now.astimezone()
            # naive, then astimezone: the zone's own offset of that moment, which tonight may change
            moment = datetime.datetime.combine(local.date(), clock).astimezone()
            return moment if moment > local else datetime.datetime.combine(
                local.date() + datetime.timedelta(days=1), clock).astimezone()
        moment = datetime.datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.astimezone()
    except ValueError as error:
        raise UserError(f"--until {text!r} is no time.", "Write 07:00, or 2026-03-01T07:00.") from error
    if moment <= now:
        raise UserError(f"--until {text} has passed.", "Give a time in the future.")
    return moment

