"""A user's mistake: what its message holds, in every place that raises one, and how a command line ends."""

import ast
import os
import pathlib
import pickle
import subprocess
import sys

import pytest

from blip3o_jax.errors import NoAnswer, UserError, reported

ROOT = pathlib.Path(__file__).parent.parent


def test_every_mistake_says_what_was_expected_and_what_to_do():
    wrong = []
    for path in [*ROOT.glob("blip3o_jax/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "NoAnswer"):
                names = {keyword.arg for keyword in node.keywords}
                if len(node.args) != 1 or not {"expected", "do"} <= names <= {"expected", "do", "got"}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_message_and_type_survive_pickling():
    error = NoAnswer("reward", got=3, expected="1 to 2", do="change it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is NoAnswer and str(again) == str(error) == "reward: got 3 - expected 1 to 2 - change it"


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("a", got=0, expected="1", do="raise it"), "error: a: got 0 - expected 1 - raise it"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "error: x.txt: No such file or directory - "),
        (KeyError("k"), "error: KeyError: 'k' (test_errors.py:"),
        (OSError(28, "No space left on device", "x"), "error: disk: [Errno 28] No space left on device: 'x' - "),
        (RuntimeError("RESOURCE_EXHAUSTED: No space left on device"), "error: disk: RESOURCE_EXHAUSTED: No space"),
        (OSError("Not enough disk space. Needed: 9 GB"), "error: disk: Not enough disk space. Needed: 9 GB - "),
        (MemoryError(), "error: memory: none left - "),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "error: memory: RESOURCE_EXHAUSTED: 9 GB - "),
    ],
)
def test_any_exception_ends_in_one_line_or_with_debug_in_its_traceback(error, line, capsys):
    with pytest.raises(SystemExit) as caught, reported():
        raise error
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.startswith(line) and told.count("\n") == 1
    with pytest.raises(type(error)), reported(debug=True):
        raise error


def test_a_lost_answer_does_not_hold_the_process():
    program = (
        "import threading, time; from blip3o_jax.errors import NoAnswer, reported\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "with reported(): raise NoAnswer('reward', got=0, expected='1', do='mend it')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr == "error: reward: got 0 - expected 1 - mend it\n"


def program(body: str) -> list[str]:
    head = "import os, sys, time\nfrom blip3o_jax.errors import reported\nwith reported():\n"
    return [sys.executable, "-c", head + body]


@pytest.mark.parametrize("left", ["", "async def write(): pass\n    write()\n    "])
def test_sigterm_ends_in_one_line(left):
    """Also where it ends an asynchronous writer, of which Python says that it was never awaited."""
    body = f"    {left}print('ready', flush=True)\n    time.sleep(60)"
    with subprocess.Popen(program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and err.startswith("terminated: ") and err.count("\n") == 1


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_is_gone_ends_the_process_without_a_word(flush):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        program(f"    print('x' * 100, flush={flush})"), stdout=write, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux alone")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(program("    print('x')"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr
