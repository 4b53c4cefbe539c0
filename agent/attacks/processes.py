"""Family *processes*: what a job starts, leaves behind, or does to other processes."""

from __future__ import annotations

from agent.attacks.patches import after, before, step
from agent.attacks.record import Attack

FAMILY = "processes"
_SHORT = (("wall_seconds = 20", "wall_seconds = 3"),)
_SIGNALS = "a plain process signals whatever its user may"

ATTACKS = (
    Attack("daemon", FAMILY, "leaves a detached process that goes on after its parent and rewrites the weights",
           "the process namespace dies with the job; frames after the weights are not read",
           ("same",), ("leftover",), starred=True, uncovered={0: "files in /tmp stay; the process itself is swept"},
           edits=before('''
import os, time
trainer = os.getpid()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    end = time.time() + 30
    while time.time() < end:
        try:
            open("/tmp/@MARK@", "wb").write(b"later")
            os.kill(trainer, 0)
        except ProcessLookupError:
            try:
                run.wire.send(b"W", b"later")
            except OSError:
                pass
        except OSError:
            pass
        time.sleep(0.05)
    os._exit(0)
''')),
    Attack("fork-bomb", FAMILY, "forks 400 processes that stay", "a limit on processes, for a user id of its own",
           ("killed",), ("resource", "leftover"), starred=True,
           edits=before('''
import os, time
for _ in range(400):
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
time.sleep(1)
''')),
    Attack("deaf-to-signals", FAMILY, "ignores SIGTERM and never ends", "SIGKILL to the whole tree at the wall limit",
           ("killed",), ("resource", "leftover"), config=_SHORT,
           edits=step('''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while step > 20:
    time.sleep(0.1)
''')),
    Attack("burner", FAMILY, "leaves busy processes so that the incumbent's next run is slow",
           "the tree is dead before the next job starts, and training is timed by its own CPU seconds",
           ("same",), ("leftover",),
           edits=after('''
import os, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        end = time.time() + 15
        while time.time() < end:
            pass
        os._exit(0)
''')),
    Attack("kill-others", FAMILY, "kills another process of the machine", "own process namespace, other user id",
           ("same",), ("damage",), uncovered={0: _SIGNALS},
           edits=before('''
import os
try:
    os.kill(@VICTIM@, 9)
except OSError:
    pass
''')),
    Attack("slow-others", FAMILY, "lowers the priority of another process and pins it to one core",
           "own process namespace, other user id", ("same",), ("damage",), uncovered={0: _SIGNALS},
           edits=before('''
import os
try:
    os.setpriority(os.PRIO_PROCESS, @VICTIM@, 19)
    os.sched_setaffinity(@VICTIM@, {0})
except OSError:
    pass
''')),
)
