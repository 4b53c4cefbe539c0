"""What the inside of a box sees: its files, its devices, its environment, as bubblewrap options.

Nothing of the host is visible unless it is named here. Of ``/etc`` only the loader's cache; never ``/home``, ``/root``,
``/run`` (a socket there is a way out that a network namespace does not close) or the harness's own folder.
Order matters to bubblewrap: later mounts cover earlier ones, so masks come last.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import gpu
from sandbox.job import Limits

SOURCE, OUTPUT, CACHES = "/src", "/out", "/cache"
LAUNCHER = "/etc/confine.py"
"""Where confine.py lies in a box whose hidden files it takes out of sight."""
SYSTEM_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
ALWAYS_THERE = ("/", "/tmp", "/dev", "/proc", "/sys", "/usr", "/etc")


@dataclass(frozen=True, slots=True)
class BoxSpec:
    """One process tree to be boxed.

    ``folder`` is the box's own folder outside (a scratch place for small files that are bound in, and for everything
    at level 0); it exists, is private to this box, and is removed by whoever made it.
    """

    command: tuple[str, ...]
    source: Path
    folder: Path
    uid: int
    """Real user id inside at level 3."""
    device: str = "cpu"
    threads: int = 1
    limits: Limits = Limits()
    environment: dict[str, str] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    output: Path | None = None
    output_writable: bool = True
    compile_cache: str = ""
    """Folder of compiled kernels to copy into the box's caches before the command starts."""
    keep_compile_cache: bool = False
    """Put the caches into ``output``, which is then nothing else."""
    cpus: frozenset[int] = frozenset()
    """Processors to start on; empty: all. A hint to the scheduler, not a wall."""
    library_hints: tuple[str, ...] = ()
    """The caller's LD_LIBRARY_PATH, where a container keeps its GPU driver."""


def argv(command: tuple[str, ...], output: str = "") -> tuple[str, ...]:
    """The command with a leading ``python`` replaced by the interpreter that runs this process, and ``{out}`` by the
    output folder as the job sees it."""
    words = tuple(word.replace("{out}", output) for word in command) if output else command
    return (sys.executable, *words[1:]) if words[0] in ("python", "python3") else words


def seeded(command: tuple[str, ...], cache: str) -> tuple[str, ...]:
    """``command`` after a copy of the compiled kernels in ``cache`` to CACHES.

    Compiled artefacts hold absolute paths, so the folder is at the same place in every box.
    """
    script = 'cp -r "$0/." "$1/"; shift; exec "$@"'
    return ("/bin/sh", "-c", script, cache, CACHES, *command) if cache else command


def inner_device(device: str) -> str:
    """The name of the job's device inside its box, where only its own GPUs exist: the first of them."""
    return "cuda:0" if gpu.index(device) is not None else "cpu"


def environment(box: BoxSpec, temporary: str, output: str, caches: str, harness_fd: int | None) -> dict[str, str]:
    """The whole environment of the job. Nothing is inherited. ``caches``: where compiled kernels go."""
    threads = str(box.threads)
    extra = [str(path) for path in extra_paths(box.folder)]
    values = {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": temporary, "TMPDIR": temporary, "USER": "job", "LOGNAME": "job", "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "PYTHONHASHSEED": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton",
        "CUDA_CACHE_PATH": f"{temporary}/nv", "XDG_CACHE_HOME": f"{temporary}/cache",
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        "CUDA_VISIBLE_DEVICES": "",
    }
    numbers = gpu.indices(box.device)
    if numbers:
        cards = [gpu.find(number) for number in numbers]
        values["CUDA_VISIBLE_DEVICES"] = ",".join(card.uuid if card is not None and card.uuid else str(number)
                                                  for number, card in zip(numbers, cards, strict=True))
        folders, cached = gpu.library_folders(box.library_hints)
        if folders and not cached:
            values["LD_LIBRARY_PATH"] = ":".join(folders)
    if box.output is not None and not box.keep_compile_cache:
        values["OUT_DIR"] = output
    values |= box.environment
    own = box.environment.get("PYTHONPATH")
    if extra:
        values["PYTHONPATH"] = os.pathsep.join([own, *extra] if own else extra)
    if harness_fd is not None:
        values["HARNESS_FD"] = str(harness_fd)
    return values


def options(box: BoxSpec, values: dict[str, str], uid: int, launcher: str = "") -> list[str]:
    """bubblewrap's options for the file view and the environment; namespaces and identity are the level's.

    ``uid`` is the user id that the job will see itself under. ``launcher``: file to bind at LAUNCHER, which will take
    the hidden files out of sight; else each is covered by a mount.
    """
    scratch = str(box.limits.scratch_mb << 20)
    result = ["--perms", "0755", "--dir", "/etc", *_system()]  # a parent made on the way would be 0700
    for name, text in (("passwd", f"root:x:0:0::/:/bin/false\njob:x:{uid}:{uid}::/tmp:/bin/sh\n"),
                       ("group", f"root:x:0:\njob:x:{uid}:\n"), ("empty", "")):
        file = box.folder / name
        file.write_text(text, encoding="ascii")
        file.chmod(0o444)
        if name != "empty":
            result += ["--ro-bind", str(file), f"/etc/{name}"]
    result += ["--dev", "/dev", "--size", scratch, "--perms", "1777", "--tmpfs", "/dev/shm", "--proc", "/proc",
               "--size", scratch, "--perms", "1777", "--tmpfs", "/tmp"]
    if box.keep_compile_cache and box.output is not None:
        result += ["--bind", str(box.output), CACHES]
    else:
        result += ["--size", scratch, "--perms", "1777", "--tmpfs", CACHES]
    result += _device(box)
    roots = list(readable_roots(box))
    made = set(ALWAYS_THERE)
    for root in roots:
        result += _parents(root, made)
        result += ["--ro-bind", str(root), str(root)]
    result += ["--ro-bind", str(box.source), SOURCE]
    if box.output is not None and not box.keep_compile_cache:
        result += ["--bind" if box.output_writable else "--ro-bind", str(box.output), OUTPUT]
    if launcher:
        result += ["--ro-bind", launcher, LAUNCHER]
    result += _masks(box, [Path("/usr"), *roots], files=not launcher)
    # bubblewrap makes both on file systems without a size, and at level 2 the job owns them
    result += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", SOURCE]
    for name, value in values.items():
        result += ["--setenv", name, value]
    return result


def _system() -> Iterator[str]:
    """``/usr`` and the old top-level folders, as links where the host has links."""
    yield from ("--ro-bind", "/usr", "/usr")
    for name in SYSTEM_LINKS:
        path = Path("/", name)
        if path.is_symlink():
            yield from ("--symlink", os.readlink(path), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        yield from ("--ro-bind-try", file, file)


def _device(box: BoxSpec) -> Iterator[str]:
    """Processor facts for CPU jobs; for a GPU job its own node, the shared ones, ``/sys`` and the driver."""
    if gpu.index(box.device) is None:
        yield from ("--ro-bind-try", "/sys/devices/system/cpu", "/sys/devices/system/cpu")
        return
    # Without /sys cuInit fails with 304; the nodes need --dev-bind, since --bind mounts nodev.
    yield from ("--ro-bind", "/sys", "/sys")
    for node in gpu.nodes(gpu.cards(box.device)):
        yield from ("--dev-bind-try", node, node)
    for folder in gpu.library_folders(box.library_hints)[0]:
        if not _within(Path(folder), [Path("/usr"), Path("/lib"), Path("/lib64")]):
            yield from ("--ro-bind-try", folder, folder)


def readable_roots(box: BoxSpec) -> Iterator[Path]:
    """Folders bound read-only at their own path: the interpreter, what it imports from, the job's data."""
    data = [Path(os.path.abspath(path)) for path in (*box.data, box.compile_cache) if path]
    wanted = sorted({*interpreter_roots(), *extra_paths(box.folder), *data}, key=lambda path: len(path.parts))
    taken = [Path("/usr")]
    for path in wanted:
        if path.exists() and not _within(path, taken):
            taken.append(path)
            yield path


def interpreter_roots() -> list[Path]:
    """Prefixes of the running interpreter, and of every link on the way from its name to its binary."""
    roots = [Path(text) for text in (sys.base_prefix, sys.base_exec_prefix, sys.prefix, sys.exec_prefix)]
    hop = Path(sys.executable)
    while True:
        if len(hop.parts) > 3 and hop.parent.name == "bin":
            roots.append(hop.parent.parent)
        if not hop.is_symlink():
            return [root for root in dict.fromkeys(roots) if root != Path("/")]
        hop = Path(os.path.normpath(hop.parent / os.readlink(hop)))


def extra_paths(folder: Path) -> list[Path]:
    """Site folders on ``sys.path`` outside the interpreter (``pip install --target``), by their ``*.dist-info``.

    Other folders of ``sys.path`` stay out: a checkout of the harness is there when it runs from source, with the
    held-out tokens below it, and a PYTHONPATH may name a whole home folder.
    """
    found: list[Path] = []
    for text in sys.path:
        path = Path(text).absolute()
        if not text or not path.is_dir() or _within(path, [Path("/usr"), *interpreter_roots()]):
            continue
        if any(path.glob("*.dist-info")) and not _within(folder.resolve(), [path.resolve()]):
            found.append(path)
    return list(dict.fromkeys(found))


def _masks(box: BoxSpec, roots: list[Path], files: bool) -> Iterator[str]:
    """An empty file over each hidden one, its bytecode gone, wherever a bind shows it; other Python trees emptied.
    Only the latter without ``files``.

    Each mount costs bubblewrap about 1 ms and more the more there are (it rereads the mount table), so the bytecode
    folder is replaced by a pruned one in one mount. The empty file is the box's own, so it need not be read-only.
    """
    if not box.hidden:
        return
    for tree in other_python_trees(roots):
        yield from ("--perms", "0555", "--size", "4096", "--tmpfs", str(tree), "--remount-ro", str(tree))
    if not files:
        return
    pairs = [*((root, root.resolve()) for root in roots), (Path(SOURCE), box.source.resolve())]
    folders: dict[Path, set[str]] = {}
    for name in box.hidden:
        real = Path(os.path.realpath(name))
        if real.is_file():
            folders.setdefault(real.parent, set()).add(real.stem)
            for place in _shown(real, pairs):
                yield from ("--bind", str(box.folder / "empty"), str(place))
    for number, (folder, stems) in enumerate(folders.items()):
        cache = folder / "__pycache__"
        if cache.is_dir() and any(file.name.partition(".")[0] in stems for file in cache.iterdir()):
            pruned = _pruned(cache, stems, box.folder / f"bytecode{number}")
            for place in _shown(cache, pairs):
                yield from ("--ro-bind", str(pruned), str(place))


def _shown(path: Path, pairs: list[tuple[Path, Path]]) -> list[Path]:
    """Where a real path of the host appears inside, given (place inside, real folder) of every bind."""
    return list(dict.fromkeys(root / path.relative_to(origin) for root, origin in pairs if _within(path, [origin])))


def _pruned(cache: Path, stems: set[str], target: Path) -> Path:
    """A copy of a bytecode folder (hard links where the disk allows) without the modules ``stems``."""
    target.mkdir(mode=0o755)
    for file in cache.iterdir():
        if file.is_file() and file.name.partition(".")[0] not in stems:
            try:
                os.link(file, target / file.name)
            except OSError:
                shutil.copy2(file, target / file.name)
    return target


def other_python_trees(roots: Iterable[Path]) -> list[Path]:
    """Visible trees that may hold the same text as a hidden file and that the running interpreter does not use."""
    places = [*Path("/usr/lib").glob("python3*"), *Path("/usr/lib").glob("pypy*"),
              *Path("/usr/local/lib").glob("python3*"), *Path("/usr/local/lib").glob("pypy*")]
    for root in roots:
        places += [root / "pkgs", root / "envs"]  # conda keeps unpacked copies of every package there
    used = [Path(text).resolve() for text in sys.path if text]
    return [place for place in dict.fromkeys(places)
            if place.is_dir() and not place.is_symlink()
            and not any(_within(path, [place]) or _within(place, [path]) for path in used)]


def _parents(path: Path, made: set[str]) -> Iterator[str]:
    """``--dir`` for each parent, traversable: the dropped user could not pass a parent made 0700."""
    for parent in reversed(path.parents):
        if str(parent) not in made:
            made.add(str(parent))
            yield from ("--perms", "0755", "--dir", str(parent))


def _within(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
