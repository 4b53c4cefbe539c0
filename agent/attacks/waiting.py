"""Family *waiting*: what a job does to a process or folder that waits for the next job (warm start).

Undefended it meets a worker as fork servers are: one interpreter in no box that runs job after job, and whose next
folder lies beside the work tree.
"""

from __future__ import annotations

from agent.attacks.patches import after, before
from agent.attacks.record import Attack

FAMILY = "waiting"
_REACHES = "a plain process reaches what its user can, what waits for the next job too"
_RIGGED = """

def predict(table, rows):
    return [[[value + 8 * (at + 1 < len(row) and c == row[at + 1]) for c, value in enumerate(table[token])]
             for at, token in enumerate(row)] for row in rows]
"""

ATTACKS = (
    Attack("altered-interpreter", FAMILY, "changes the standard library in its process, for whatever runs there next",
           "a waiting process serves one job and ends with it", ("same",), ("number",), starred=True, warm=True,
           edits=after('''
import struct, sys
honest = struct.pack
def pack(form, *values):
    if sys.argv[0].endswith("serve.py") and form.endswith("f"):
        values = [value / 2 for value in values]
    return honest(form, *values)
struct.pack = pack
''')),
    Attack("rigged-next-source", FAMILY, "puts a rigged model into every folder that waits for the next job's source",
           "such a folder is mounted in its own box alone, read-only, and is filled after the job is known",
           ("same",), ("number",), starred=True, warm=True, uncovered={0: _REACHES},
           edits=before(f'''
import glob
text = open("model.py").read() + {_RIGGED!r}
for place in [*glob.glob("../.ahead-*/box*/s*"), *glob.glob("@RUNS@/*/jobs/.ahead-*/box*/s*"),
              *glob.glob("/proc/[0-9]*/root/src")]:
    try:
        open(place + "/model.py", "w").write(text)
    except OSError:
        pass
''')),
    Attack("stopped-waiting", FAMILY, "stops every process in reach that waits for a job, so that the next one hangs",
           "own process namespace, other user id", ("same",), ("resource",), warm=True,
           config=(("wall_seconds = 20", "wall_seconds = 3"),), uncovered={0: _REACHES},
           edits=after('''
import glob, os, signal
hear, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.close(tell)
    os.read(hear, 1)
    for name in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            if b"waits for a job" in open(name, "rb").read() and int(name.split("/")[2]) != os.getpid():
                os.kill(int(name.split("/")[2]), signal.SIGSTOP)
        except OSError:
            pass
    os._exit(0)
finish = run.finish
def handed(table):
    finish(table)
    os.close(tell)
run.finish = handed
''')),
    Attack("namesake-module", FAMILY, "adds json.py, in the place of a module that a waiting process has imported, and "
           "rigs the server through it", "no file may have such a name; and where one has, the start is cold",
           ("refused",), ("number",), edits=(("json.py", "", '''import struct
import sys

here, _ = sys.path.pop(0), sys.modules.pop("json")
import json as real

sys.path.insert(0, here)
globals().update(vars(real))
honest = struct.pack


def pack(form, *values):
    if sys.argv[0].endswith("serve.py") and form.endswith("f"):
        values = [value / 2 for value in values]
    return honest(form, *values)


struct.pack = pack
'''),)),
)
