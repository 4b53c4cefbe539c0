"""Family *limits*: time, memory, disk and log are taken without measure. Each amount is bounded in the code here."""

from __future__ import annotations

from agent.attacks.patches import before, step
from agent.attacks.record import Attack

FAMILY = "limits"
_SHORT = (("wall_seconds = 20", "wall_seconds = 3"),)

ATTACKS = (
    Attack("frozen-clock", FAMILY, "stops Python's clocks and trains on one batch for ever",
           "the supervisor's own clock, and SIGKILL at the wall limit", ("killed",), ("resource",), config=_SHORT,
           edits=step('''
import time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
while step == 20 and time.time() < 1:
    for row in batch:
        update(table, row, settings.RATE)
''')),
    Attack("memory", FAMILY, "allocates and touches far more memory than the limit", "memory is capped",
           ("killed",), ("resource",),
           edits=before('''
import time
held = []
for _ in range(40):
    held.append(b"x" * (16 << 20))
    time.sleep(0.02)
time.sleep(1)
''')),
    Attack("full-disk", FAMILY, "fills /tmp, /dev/shm and its own folder for temporary files",
           "they are the job's own, of limited size, and gone at its end", ("killed",), ("leftover",),
           uncovered={0: "there is one /tmp for all"},
           edits=before('''
import tempfile, time
for place in ("/tmp", "/dev/shm", tempfile.gettempdir()):
    try:
        for number in range(6):
            with open(f"{place}/@MARK@-{number}", "wb") as file:
                file.write(b"x" * (16 << 20))
    except PermissionError:
        pass
time.sleep(3)
''')),
    Attack("many-files", FAMILY, "makes twenty thousand empty files in /tmp and /dev/shm",
           "both are the job's own and gone at its end", ("same", "killed"), ("leftover",),
           uncovered={0: "there is one /tmp for all"},
           edits=before('''
import os
for place in ("/tmp/@MARK@", "/dev/shm/@MARK@"):
    try:
        os.mkdir(place)
        for number in range(10000):
            open(f"{place}/{number}", "w").close()
    except PermissionError:
        pass
''')),
    Attack("log-flood", FAMILY, "prints forty megabytes", "the log is capped, and who prints far more is killed",
           ("killed",), ("resource",),
           edits=step('''
if step < 10:
    print(("x" * 127 + "\\n") * (4 << 13), flush=True)
''', probe=False)),
)
