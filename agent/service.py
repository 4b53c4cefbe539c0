"""A systemd user unit and its timer for a campaign every night, as text: nothing is installed or written."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from agent.errors import UserError

UNIT = """# ~/.config/systemd/user/ratchet.service
[Unit]
Description=Ratchet: improve {what} overnight

[Service]
Type=exec
WorkingDirectory={folder}
# keys and model: OPENAI_API_KEY=..., RATCHET_MODEL=...; chmod 600; without the file the idea book proposes
EnvironmentFile=-%h/.config/ratchet.env
ExecStart={command}
# 130: stopped by a person or by systemctl stop; the next start goes on where it stopped
SuccessExitStatus=130
Restart=on-failure
RestartSec=60
# 1, 2: something that a person must mend; starting again would not help
RestartPreventExitStatus=1 2
KillSignal=SIGTERM
# only ratchet itself gets the signal: it ends its jobs and writes down what they came to
KillMode=mixed
TimeoutStopSec=60
"""
TIMER = """# ~/.config/systemd/user/ratchet.timer
[Unit]
Description=Start ratchet every night

[Timer]
OnCalendar=*-*-* {at}:00

[Install]
WantedBy=timers.target
"""


def units(repo: Path | None, runs: Path, at: str, until: str) -> Iterator[str]:
    """The two files, one after the other. Raises UserError for a time that is none.

    Paths are absolute, ``%`` is doubled and words are quoted as systemd.service(5) asks for.
    """
    for name, text in (("--at", at), ("--until", until)):
        try:
            datetime.time.fromisoformat(text)
        except ValueError as error:
            raise UserError(f"{name} {text!r} is no time of day.", "Write for instance 22:00.") from error
    folder = Path.cwd()
    words = [sys.executable, "-m", "agent.cli", "run", *([str(repo.resolve())] if repo else []), "--until", until,
             "--runs", str(runs.resolve())]
    command = " ".join(quoted(word) for word in words)
    what = repo.resolve().name if repo else "the target that comes with it"
    yield from UNIT.format(what=what.replace("%", "%%"), folder=str(folder).replace("%", "%%"),
                           command=command).splitlines()
    yield ""
    yield from TIMER.format(at=at[:5]).splitlines()
    yield ""
    yield "# then:  systemctl --user daemon-reload && systemctl --user enable --now ratchet.timer"
    yield "# to stay on after you log out:  loginctl enable-linger"


def quoted(word: str) -> str:
    """A word of ExecStart: specifiers and variables are taken literally."""
    plain = word.replace("%", "%%").replace("$", "$$")
    if shlex.quote(word) == word and plain == word:
        return word
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
