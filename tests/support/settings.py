"""Settings of experiments, changed for a test."""

import copy


def changed(settings: dict, **changes) -> dict:
    """The settings with values at dotted names (`__` for the dot) replaced or added."""
    settings = copy.deepcopy(settings)
    for name, value in changes.items():
        *path, last = name.split("__")
        section = settings
        for key in path:
            section = section[int(key)] if isinstance(section, (list, tuple)) else section[key]
        section[last] = value
    return settings
