"""Editable: the hyper-parameters of each preset, one a line, one file a preset."""

from settings.base import Settings


def settings(preset: str) -> Settings:
    """Hyper-parameters of ``preset``. Sizes without a file of their own use those of h100; mid uses those of cpu, so
    that what is found at the one can be tried again at the other."""
    if preset in ("cpu", "mid"):
        from settings.cpu import SETTINGS
    else:
        from settings.h100 import SETTINGS
    return SETTINGS
