"""Family *server*: code of the patch runs in the model server and lies on the wire, hangs, or speaks of what it saw."""

from __future__ import annotations

from agent.attacks.patches import Edits, on_load, predict
from agent.attacks.record import Attack

FAMILY = "server"
_SHORT = (("wall_seconds = 20", "wall_seconds = 3"), ("audit = 256\nseconds = 20", "audit = 256\nseconds = 3"))
_SPEAK = '''
text = "\\n".join("".join("%x" % token for token in row) for row in rows)
'''
_ONLY_SERVER = 'if not sys.argv[0].endswith("serve.py"):\n    return honest(table, rows)\n'


def _answers(payload: str) -> Edits:
    """What goes out as bulk losses is ``payload``, an expression over ``losses``."""
    return on_load(f'''
import struct
import wire
honest_send = wire.Wire.send
def send(self, kind, payload=b""):
    if kind == b"L":
        losses = struct.unpack(f"<{{len(payload) // 4}}f", payload)
        payload = struct.pack(f"<{{len(losses)}}f", *({payload}))
    honest_send(self, kind, payload)
wire.Wire.send = send
''')


ATTACKS = (
    Attack("flattery", FAMILY, "replaces the server's sending, and answers half of each loss",
           "the audit takes logits and computes losses itself; the difference shows", ("invalid",), ("number",),
           edits=_answers("[loss / 2 for loss in losses]")),
    Attack("negative-losses", FAMILY, "answers losses below nought", "no probability has a negative logarithm's loss",
           ("invalid",), ("number",), edits=_answers("[-1.0 for loss in losses]")),
    Attack("losses-not-numbers", FAMILY, "answers NaN, which compares as neither better nor worse",
           "answers must be finite", ("invalid",), ("number",), edits=_answers('[float("nan") for loss in losses]')),
    Attack("hanging-server", FAMILY, "never answers the first question in bulk", "a wall limit on the evaluation",
           ("killed",), ("resource",), config=_SHORT,
           edits=predict('''
import sys, time
if sys.argv[0].endswith("serve.py") and rows and len(rows[0]) == 32:
    time.sleep(60)
return honest(table, rows)
''')),
    Attack("held-out-text-in-an-error", FAMILY, "raises an error whose text is the held-out rows it was asked about",
           "of a server's log only the name of a known exception is repeated", ("invalid",), ("leak",), model=True,
           edits=predict(f'''
import sys
{_ONLY_SERVER}{_SPEAK}
raise ValueError(text)
''')),
    Attack("held-out-text-in-the-log", FAMILY, "prints the held-out rows that it is asked about",
           "a server's log is kept from everybody", ("same",), ("leak",),
           edits=predict(f'''
import sys
{_ONLY_SERVER}{_SPEAK}
print(text, flush=True)
return honest(table, rows)
''')),
)
