"""The box keeps what its level claims. A machine without bubblewrap or namespaces skips, and says so."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_world import GOOD, World

from sandbox import box as boxes
from sandbox import confine
from sandbox.box import Level, command, describe, explain, job_uid, probe
from sandbox.job import Limits
from sandbox.view import BoxSpec

CANARY = "canary-9f1c"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(params=[3, 2, 1])
def level(request: pytest.FixtureRequest) -> int:
    found = explain(request.param)
    if found.level != request.param:
        pytest.skip(f"this machine cannot hold level {request.param}: {found.refused.get(Level(request.param))}")
    return int(request.param)


def test_probe_stays_below_what_is_asked_and_says_why() -> None:
    assert probe(0) is Level.PLAIN
    found = explain(3)
    assert set(found.refused) == {step for step in (3, 2, 1) if step > found.level}
    assert "does not stop" in describe(0).lower() and "apt install bubblewrap" in describe(0)
    assert "run as root" in describe(2)


def test_nothing_of_the_host_is_in_argv_or_environment(tmp_path: Path, level: int, monkeypatch: pytest.MonkeyPatch
                                                       ) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    (tmp_path / "box").mkdir()
    launch = command(BoxSpec(("python", "x.py"), tmp_path, tmp_path / "box", job_uid(0)), Level(level))
    assert CANARY not in " ".join((*launch.wrapper, *launch.options, *launch.inner, *launch.env.values()))
    assert "OPENAI_API_KEY" not in launch.env
    if level >= 2:  # bubblewrap's own start environment shows in the box as that of process 1
        assert launch.env == {} and launch.filter
        assert launch.options.count("--unshare-net") == 1 and "--die-with-parent" in launch.options


SPY = r'''
import glob, os, socket, sys
def attempt(name, action):
    try:
        print(name, "GOT", str(action())[:200])
    except Exception as error:
        print(name, "refused", type(error).__name__)
def everything(root):
    found = []
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(place, name) not in (sys.prefix, sys.base_prefix)]
        for name in files:
            try:
                if os.path.getsize(os.path.join(place, name)) < 4096:
                    with open(os.path.join(place, name), errors="replace") as file:
                        found.append(file.read())
            except OSError:
                pass
    return "".join(found)
attempt("canary", lambda: open(CANARY_FILE).read())
attempt("passwd", lambda: open("/etc/shadow").read())
attempt("self", lambda: __import__("pwd").getpwuid(os.getuid()) and None)
attempt("connect", lambda: socket.create_connection(("127.0.0.1", PORT), 2))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53)))
attempt("source", lambda: open("/src/planted.py", "w"))
attempt("venv", lambda: open(sys.prefix + "/planted.py", "w"))
attempt("raise", lambda: os.setuid(0))
attempt("mount", lambda: os.execv("/bin/mount", ["mount", "-o", "remount,rw,bind", "/usr"]) if os.fork() == 0
        else (_ for _ in ()).throw(OSError("waited")) if os.wait()[1] else "mounted")
try: print("processes", sorted(int(name) for name in os.listdir("/proc") if name.isdigit()))
except PermissionError: print("processes []")
print("users", os.getuid(), "hostname", os.uname().nodename)
for path in ["/proc/self/environ", "/proc/%d/environ" % os.getppid(), *glob.glob("/proc/[0-9]*/environ")]:
    try: print("environ", open(path, "rb").read())
    except OSError: pass
print("walk", "CANARY" if MARK in everything("/tmp") + everything("/etc") + everything("/root") + everything("/home")
      + everything("/run") + everything("/var") else "nothing")
'''


def test_no_files_network_processes_or_keys_of_the_host(world: World, level: int, monkeypatch: pytest.MonkeyPatch
                                                        ) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    secret = world.folder / "secret.txt"
    secret.write_text(CANARY, encoding="ascii")
    with socket.create_server(("127.0.0.1", 0)) as server:
        spy = SPY.replace("CANARY_FILE", repr(str(secret))).replace("PORT", str(server.getsockname()[1]))
        spy = spy.replace("MARK", f"'{CANARY[:7]}' + '{CANARY[7:]}'")
        result = world.run(world.job(world.source(spy + GOOD), max_level=level))
    text = world.log()
    assert (result.fault, result.level) == (None, level), text
    assert CANARY not in text and text.count("environ b") >= 1, text
    assert re.findall(r"(\w+) GOT", text) == (["self"] if level >= 2 else []), text
    assert "walk nothing" in text and ("hostname job" in text) == (level >= 2)
    assert max(eval(re.search(r"processes (\[.*\])", text)[1]), default=0) < 20  # type: ignore[index]
    if level == 3 or (os.geteuid() == 0 and level == 1):
        assert int(re.search(r"users (\d+)", text)[1]) >= boxes.FIRST_UID  # type: ignore[index]


READ = """import glob, os
def size(path):
    try:
        with open(path, "rb") as file: return len(file.read())
    except PermissionError: return 0
"""


def test_hidden_files_cannot_be_read_wherever_they_show(world: World, level: int) -> None:
    import this as module
    path = str(module.__file__)
    look = (f"{READ}print('size', size({path!r}))\n"
            f"print('bytecode', [size(p) for p in glob.glob({str(Path(path).parent)!r} + '/__pycache__/this.*.pyc')])\n"
            "import sys\nfound = [p for root in ('/usr', '/usr/local', sys.prefix, sys.base_prefix) for p in "
            "glob.glob(root + '/lib/py*/this.py') if size(p)]\nprint('copies', found)\n"
            f"print('sibling', size({os.__file__!r}) > 0)\n")
    seen = world.run(world.job(world.source(look + GOOD), max_level=level))
    assert seen.fault is None and "size 0" not in world.log()
    hidden = world.run(world.job(world.source(look + GOOD), max_level=level, hidden=(path, "/nowhere/x.py")))
    assert hidden.fault is None, hidden
    text = world.log()
    assert "size 0\n" in text and "copies []" in text and "sibling True" in text
    assert all(size == 0 for size in eval(re.search(r"bytecode (\[.*\])", text)[1]))  # type: ignore[index]


def test_many_hidden_files(world: World, level: int) -> None:
    folder = Path(os.__file__).parent
    files = sorted(str(path) for path in (folder / "test").glob("test_*.py"))[:150] or sorted(
        str(path) for path in folder.glob("idlelib/**/*.py"))
    look = (f"{READ}files = {files!r}\nprint('sizes', sum(map(size, files)))\ntmp = os.environ['TMPDIR']\n"
            "tmp += '/links'\nos.mkdir(tmp)\n"  # a folder of its own: the interpreter itself may lie below /tmp
            "for number, path in enumerate(files):\n    os.symlink(path, f'{tmp}/{number}')\n"
            "    try: os.link(path, f'{tmp}/hard{number}')\n    except OSError: pass\n"
            "print('links', sum(size(f'{tmp}/{name}') for name in os.listdir(tmp)))\n"
            "print('root', sum(size('/proc/self/root' + path) for path in files))\n"
            "beside = [p for p in glob.glob(os.path.dirname(files[0]) + '/*.py') if p not in files]\n"
            f"print('beside', all(map(size, [*beside, {os.__file__!r}])))\n"
            "bytecode = glob.glob(os.path.dirname(files[0]) + '/__pycache__/*.pyc')\n"
            "stems = {os.path.basename(p)[:-3] for p in files}\n"
            "print('bytecode', sum(size(p) for p in bytecode if os.path.basename(p).split('.')[0] in stems))\n"
            "os.makedirs(tmp + '/a'); os.makedirs(tmp + '/b'); open(tmp + '/a/x', 'w').close()\n"
            "os.rename(tmp + '/a/x', tmp + '/b/y')\nprint('moved', os.path.exists(tmp + '/b/y'))\n"
            "os.rename(tmp + '/b', tmp + '/a/b')\nprint('uid', os.getuid())\n")
    result = world.run(world.job(world.source(look + GOOD), max_level=level, hidden=tuple(files)))
    text = world.log()
    assert result.fault is None, text
    for line in ("sizes 0", "links 0", "root 0", "beside True", "bytecode 0", "moved True"):
        assert f"{line}\n" in text, text
    if os.geteuid() == 0:
        assert (int(re.search(r"uid (\d+)", text)[1]) >= boxes.FIRST_UID) == (level != 2)  # type: ignore[index]


def test_many_hidden_files_by_mounts_where_there_is_no_landlock(
        world: World, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if level == 1:
        pytest.skip("level 1 is Landlock")
    monkeypatch.setattr(boxes.confine, "abi", lambda: 0)
    test_many_hidden_files(world, level)


def test_hidden_files_of_the_source_are_hidden_where_the_box_shows_it(world: World, level: int) -> None:
    names = {f"secret{number}": f"held = 'CANARY{number}'\n" for number in range(40)}
    source = world.source(f"{READ}print('own', sum(map(size, glob.glob('secret*.py'))), size('train.py') > 0)\n" + GOOD,
                          **names)
    hidden = tuple(str(source / f"{name}.py") for name in names)
    assert world.run(world.job(source, max_level=level, hidden=hidden)).fault is None
    assert world.log().startswith("own 0 True\n")


def test_a_launcher_that_cannot_shut_itself_in_does_not_run_the_command(tmp_path: Path) -> None:
    plan = confine.Plan(uid=-1, search=False, rules=[], handled=0, filter="", parent=1)
    launch = boxes.Launch((), (), ("/usr/bin/touch", str(tmp_path / "ran")), {}, str(tmp_path),
                          launcher=(sys.executable, "-I", "-S", confine.__file__), plan=plan)
    read, report = os.pipe()
    with boxes.opened(launch, report) as (argv, fds):
        done = subprocess.run(argv, env={}, pass_fds=fds)
    os.close(report)
    said = os.read(read, 1000)
    os.close(read)
    assert done.returncode == 126 and not (tmp_path / "ran").exists()
    assert boxes.trouble(Level.LANDLOCK, said) == boxes.trouble(Level.ROOT, b'{"exit-code": 126}\n' + said)
    assert "supervisor is gone" in said.decode()
    assert boxes.trouble(Level.LANDLOCK, b"") is None and boxes.trouble(Level.ROOT, b'{"child-pid": 3}\n') == ""


def test_scratch_is_sized(world: World, level: int) -> None:
    fill = ("for folder in ('/tmp', '/dev/shm'):\n    try:\n        with open(folder + '/test-fills', 'wb') as file:\n"
            "            for _ in range(64): file.write(bytes(1 << 20))\n        print('filled')\n"
            "    except OSError as error: print('full', error.errno)\n")
    result = world.run(world.job(world.source(fill + GOOD), max_level=level,
                                 limits=Limits(wall_seconds=20, scratch_mb=16)))
    # level 1 has no /tmp and no /dev/shm; what it has is measured
    assert result.fault is None and world.log().count("full 28" if level >= 2 else "full 13") == 2


def test_a_program_that_asks_whether_it_may_write_its_temporary_files_hears_yes(world: World, level: int,
                                                                                tmp_path: Path) -> None:
    """As gcc does, with access(2), which forgets what a capability allows; behind a folder closed to others."""
    tmp_path.chmod(0o700)
    look = ("import os\nplace = os.environ['TMPDIR']\nprint('may', os.access(place, os.R_OK | os.W_OK | os.X_OK))\n"
            "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('CapEff')])\n")
    result = world.run(world.job(world.source(look + GOOD), max_level=level))
    assert result.fault is None and world.log().startswith("may True\n"), world.log()
    assert int(world.log().splitlines()[1], 16) in ((0, 4) if level == 1 else (0,))


def test_source_that_others_may_not_read_still_runs(world: World, level: int) -> None:
    source = world.source()
    for file in source.iterdir():
        file.chmod(0o600)
    source.chmod(0o700)
    assert world.run(world.job(source, max_level=level)).fault is None
    assert (source / "train.py").stat().st_mode & 0o777 == 0o600


def test_data_folder_is_there_and_read_only(world: World, level: int) -> None:
    data = world.folder / "corpus" / uuid.uuid4().hex
    data.mkdir(parents=True)
    (data / "x.txt").write_text("corpus text", encoding="ascii")
    look = (f"print(open({str(data / 'x.txt')!r}).read())\n"
            f"try: open({str(data / 'y')!r}, 'w')\nexcept OSError: print('ro')\n")
    result = world.run(world.job(world.source(look + GOOD), max_level=level, data=(str(data),)))
    assert result.fault is None and world.log().startswith("corpus text\nro\n")


def test_plain_level_keeps_the_source_as_it_was(world: World) -> None:
    source = world.source("open('planted.py', 'w').close()\nopen('train.py', 'w').close()\n" + GOOD)
    result = world.run(replace(world.job(source), max_level=0))
    assert (result.fault, result.level) == (None, 0)
    assert not (source / "planted.py").exists() and (source / "train.py").read_text(encoding="utf-8").endswith(GOOD)


def test_a_leading_python_is_this_interpreter(world: World) -> None:
    result = world.run(world.job(world.source("import sys\nprint(sys.executable)\n" + GOOD)))
    assert result.fault is None and world.log().splitlines()[0] == sys.executable


@pytest.mark.parametrize(("level", "inside"), [(Level.PLAIN, None), (Level.USER, "/out")])
def test_out_in_a_command_is_the_output_folder_as_the_job_sees_it(
        tmp_path: Path, level: Level, inside: str | None) -> None:
    for name in ("source", "box", "out"):
        (tmp_path / name).mkdir()
    spec = BoxSpec(("python", "x.py", "--to={out}/x"), tmp_path / "source", tmp_path / "box", 20000,
                   output=tmp_path / "out")
    launch = command(spec, level)
    assert launch.inner[-1] == f"--to={inside or tmp_path / 'out'}/x"
