"""What a box at level 1 may touch, as Landlock rules: the counterpart of view.py where nothing can be mounted.

``but_hidden`` serves levels 2 and 3, where many held-out files are kept out in the same way.

Landlock only grants, and what is granted for a folder holds for all below it. So a held-out file is kept out by
granting its siblings, and the siblings of each folder above it, one by one. Nothing is granted that is not named
here: no home folder, no ``/etc`` but the loader's cache, no ``/run``, no ``/dev/shm``, and of ``/proc`` only facts
about the machine and the command's own entry (its children have none).

Not mediated by Landlock, hence open to the job: names, sizes and modes of files (``stat``) and the targets of links.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sandbox import confine, gpu, view
from sandbox.view import BoxSpec

READ = confine.READ_FILE | confine.READ_DIR | confine.EXECUTE
DEVICE = confine.READ_FILE | confine.WRITE_FILE
OWN = ((1 << 16) - 1) & ~(confine.MAKE_CHAR | confine.MAKE_BLOCK | confine.IOCTL_DEV)
FACTS = (
    "/etc/ld.so.cache", "/dev/random", "/dev/urandom", "/sys/devices/system/cpu", "/sys/devices/system/node",
    "/sys/kernel/mm/transparent_hugepage", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
    "/proc/loadavg", "/proc/uptime", "/proc/version", "/proc/filesystems", "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max", "/proc/sys/vm/overcommit_memory",
    "/proc/sys/vm/max_map_count")

Rule = tuple[str, int]


def rules(box: BoxSpec, source: Path, own: Path) -> list[Rule]:
    """Every rule of ``box``: ``source`` is its working tree, ``own`` the folder that it may write to."""
    roots = [Path("/usr"), *(Path("/", name) for name in view.SYSTEM_LINKS), *view.readable_roots(box), source]
    if box.output is not None and not box.output_writable:
        roots.append(box.output)
    closed = {Path(os.path.realpath(name)) for name in box.hidden} | set(view.other_python_trees(roots))
    result = [*_granted(roots, closed | bytecode(closed)), *((path, READ) for path in FACTS)]
    result += [(path, DEVICE) for path in ("/dev/null", "/dev/zero", "/dev/full")]
    result.append((str(own), OWN))
    if box.output is not None and box.output_writable:
        result.append((str(box.output), OWN))
    return [*result, *_gpu(box)]


def bytecode(closed: Iterable[Path]) -> set[Path]:
    """The compiled forms of hidden files, which hold their strings."""
    stems: dict[Path, set[str]] = {}
    for path in closed:
        if path.suffix == ".py":
            stems.setdefault(path.parent / "__pycache__", set()).add(path.stem)
    return {Path(entry.path) for folder, names in stems.items() if folder.is_dir()
            for entry in os.scandir(folder) if entry.name.partition(".")[0] in names}


def _granted(roots: Iterable[Path], closed: set[Path]) -> Iterator[Rule]:
    """Rules to read ``roots`` whole but for ``closed``; links need none, since Landlock looks at where they lead."""
    names, above = set(map(str, closed)), {str(parent) for path in closed for parent in path.parents}
    taken: list[Path] = []
    for root in sorted({Path(os.path.realpath(root)) for root in roots}, key=lambda path: len(path.parts)):
        if not any(root.is_relative_to(place) for place in taken) and not {str(root), *map(str, root.parents)} & names:
            taken.append(root)
            yield from _below(str(root), names, above)


def _below(folder: str, closed: set[str], above: set[str]) -> list[Rule]:
    """Plain strings: with 200 hidden files there are 5,000 rules, which paths as objects would make 100 ms dearer."""
    if folder not in above:
        return [(folder, READ)]
    found: list[Rule] = [(folder, confine.READ_DIR)]
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return found
    for entry in entries:
        if entry.path in above:
            found += _below(entry.path, closed, above)
        elif entry.path not in closed and not entry.is_symlink():
            found.append((entry.path, READ))
    return found


def but_hidden(box: BoxSpec) -> list[Rule]:
    """Rules for inside a box of level 2 or 3 to read whatever is there but the hidden files and their bytecode.

    Moving files between folders (REFER) is denied by every ruleset that does not grant it. Nothing here may be a link:
    what a rule names is opened, and the rule is for where that leads.
    """
    closed = {Path(os.path.realpath(name)) for name in box.hidden}
    closed |= bytecode(closed)
    names, above = set(map(str, closed)), {str(parent) for path in closed for parent in path.parents}
    result: list[Rule] = [("/", confine.REFER)]
    result += [(f"/{name}", confine.READ_FILE) for name in view.SYSTEM_LINKS if not Path("/", name).is_symlink()]
    result += [(path, confine.READ_FILE)
               for path in ("/etc", "/dev", "/proc", "/sys", "/tmp", view.OUTPUT, view.CACHES)]
    if gpu.index(box.device) is not None:
        result += [(path, confine.READ_FILE) for path in gpu.library_folders(box.library_hints)[0]
                   if not Path(path).is_relative_to("/usr") and not Path(path).is_symlink()]
    shown = [(str(root), os.path.realpath(root)) for root in (Path("/usr"), *view.readable_roots(box))]
    for place, real in (*shown, (view.SOURCE, os.path.realpath(box.source))):
        if real not in names:
            result += [(place + path[len(real):], confine.READ_FILE) for path, rights in _below(real, names, above)
                       if rights & confine.READ_FILE]
    return result


def _gpu(box: BoxSpec) -> Iterator[Rule]:
    """The nodes of the box's own GPUs, its driver's libraries, and what CUDA reads and names."""
    if gpu.index(box.device) is None:
        return
    for node in gpu.nodes(gpu.cards(box.device)):
        yield node, DEVICE | confine.READ_DIR | confine.IOCTL_DEV
    for path in ("/sys", "/proc/driver", "/proc/devices", "/proc/sys/vm/mmap_min_addr",
                 *gpu.library_folders(box.library_hints)[0]):
        yield path, READ
    yield "/proc/self/task", READ | confine.WRITE_FILE | confine.TRUNCATE  # the driver names its threads


def closed_to_others(paths: Iterable[Path]) -> Path | None:
    """The first folder on the way to one of ``paths`` that other users may not enter; None when there is none."""
    for path in paths:
        real = Path(os.path.realpath(path))
        for folder in (*reversed(real.parents), *([real] if real.is_dir() else [])):
            if folder.exists() and not folder.stat().st_mode & 0o001:
                return folder
    return None
