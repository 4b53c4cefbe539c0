"""Where the files that are not code lie: the prompts, and the training repo that is improved by default.

In a checkout they are the top-level folders ``prompts/`` and ``target_repo/``. In an installed wheel the same two
folders are package data under ``agent/_data/`` (pyproject.toml, ``tool.hatch.build.targets.wheel.sources``).
Does not cover installs that are run from a zip file: git, the jinja2 loader and the box need real folders.
"""

from __future__ import annotations

from pathlib import Path

from agent.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def prompts() -> Path:
    """Folder of the jinja2 templates and of ``ideas/``. Raises UserError when the install lacks it."""
    return _folder("prompts", PACKAGE)


def default_target() -> Path:
    """Folder of the default training repo. May be read-only, and in a wheel it is no git repository: copy it first.

    Raises UserError when the install lacks it.
    """
    return _folder("target_repo", PACKAGE)


def _folder(name: str, package: Path) -> Path:
    """``name`` as package data of ``package``, else beside it in the checkout.

    Package data is looked for first: in site-packages a folder beside ``agent`` may be anyone's.
    """
    places = (package / "_data" / name, package.parent / name)
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise UserError(f"This install lacks the folder {name} (looked for {looked}).",
                    "Install again: pip install --force-reinstall lossratchet.")
