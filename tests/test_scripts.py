"""scripts/*.sh: what reaches `train.py` through the shells that a launcher starts."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
FLAGS = ["--config.validation.prompts=('a red star', \"it's $5; 3 * 2\")", "--config.mesh.fsdp=16"]
VARIABLES = {
    "tpu_pod.sh": {"ZONE": "us-east5-a", "REPOSITORY": "https://example.org/code", "BUCKET": "runs"},
    "tpu_xpk.sh": {"CLUSTER": "c", "PROJECT": "p", "ZONE": "us-east5-a", "IMAGE": "i"},
}


def _record(path: Path, name: str) -> None:
    """Writes a program that prints its arguments, one per line, to the file ARGUMENTS."""
    program = path / name
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ARGUMENTS"\n')
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "launcher", "first"), [("tpu_pod.sh", "gcloud", ["train"]), ("tpu_xpk.sh", "xpk", [])]
)
@pytest.mark.parametrize("flags", [FLAGS, []])
def test_flags_reach_the_remote_shell_as_they_were_given(tmp_path, script, launcher, first, flags):
    """A flag with spaces, quotes and characters of the shell is one argument of `train.py`."""
    _record(tmp_path, launcher)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGUMENTS": str(tmp_path / "arguments"), "CONFIG": "c.py:a"}
    subprocess.run([SCRIPTS / script, *first, *flags], env={**os.environ, **VARIABLES[script], **own}, check=True)
    called = (tmp_path / "arguments").read_text()
    command = shlex.split(called.split("--command=")[1].split(" \n")[0].split(" > ")[0])
    got = command[command.index("train.py") + 1 :]
    assert "--config=c.py:a" in got and any(one.startswith("--workdir=") for one in got)
    assert [one for one in got if not one.startswith(("--config=", "--workdir="))] == flags
