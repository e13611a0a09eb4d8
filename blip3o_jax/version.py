"""The package's version, and the commit it runs from."""

import pathlib
import shutil
import subprocess

__version__ = "0.1.0"


def git_hash() -> str | None:
    """Returns the commit of the source tree, or None without git."""
    if shutil.which("git") is None:
        return None
    root = pathlib.Path(__file__).parent
    found = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
