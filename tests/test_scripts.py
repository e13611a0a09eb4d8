"""scripts/*.sh: what reaches `train.py` and the hosts through the shells that a launcher starts."""

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


def test_setup_brings_every_host_to_the_newest_commit(tmp_path):
    """Also the second time, by a path and to a branch whose names the remote shell would split or expand."""

    def program(name, text):
        (tmp_path / "bin").mkdir(exist_ok=True)
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", "-C", origin, *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    home, origin = tmp_path / "host", tmp_path / "the code; $(false)"
    home.mkdir(), origin.mkdir()
    program("gcloud", 'for one; do case "$one" in --command=*) bash -c "${one#--command=}";; esac; done')
    program("gcsfuse", 'printf "%s\\n" "$@" > "$HOME/mounted"')
    program("mountpoint", "false")
    program(
        "python3", 'mkdir -p "$HOME/venv/bin"; printf "#!/bin/sh" > "$HOME/venv/bin/pip"; chmod +x "$HOME/venv/bin/pip"'
    )
    git("init", "-q", "-b", "more'work")
    variables = {"ZONE": "z", "REPOSITORY": str(origin), "COMMIT": "more'work", "BUCKET": "my runs", "HOME": str(home)}
    variables["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for message in ("first", "second"):
        git("commit", "-q", "--allow-empty", "-m", message)
        subprocess.run([SCRIPTS / "tpu_pod.sh", "setup"], env={**os.environ, **variables}, check=True)
        head = subprocess.run(["git", "-C", home / "blip3o_jax", "rev-parse", "HEAD"], capture_output=True, text=True)
        assert head.stdout.strip() == git("rev-parse", "HEAD")
    assert (home / "mounted").read_text().splitlines()[1] == "my runs"
    variables["COMMIT"] = "missing"
    assert subprocess.run([SCRIPTS / "tpu_pod.sh", "setup"], env={**os.environ, **variables}).returncode


@pytest.mark.parametrize(
    ("given", "fraction"),
    [({}, "0.92"), ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "0.5"), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, "")],
)
def test_one_gpu_trains_where_it_is_started_with_one_share_of_memory(tmp_path, given, fraction):
    """jax refuses XLA_CLIENT_MEM_FRACTION together with its old name, XLA_PYTHON_CLIENT_MEM_FRACTION."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\n[ "$1" = - ] || printf "%s\\n" "$PWD" "$XLA_CLIENT_MEM_FRACTION" "$@"\n')
    program.chmod(0o755)
    command = [SCRIPTS / "single_gpu.sh", "configs/a b.py:c", "runs/a", *FLAGS]
    environment = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    place, share, train, *rest = done.stdout.splitlines()
    assert (place, share) == (str(tmp_path), fraction) and Path(train).samefile(SCRIPTS.parent / "train.py")
    assert rest == ["--config=configs/a b.py:c", "--workdir=runs/a", *FLAGS]
