"""Mutated inputs end in a result or in one line, in time, and leave nothing behind.

    pytest tests/fuzz --fuzz-inputs 5000 --fuzz-seed $RANDOM

runs 5,000 inputs. A failure prints its number; `--fuzz-only NAME:NUMBER` runs that input alone.
"""

import collections
import contextlib
import io
import pathlib
import random
import signal
import tempfile

import pytest

from blip3o_jax.errors import UserError
from fuzz.inputs import INPUTS, digest

SECONDS = 30


class Hang(BaseException):
    """Raised in an input that takes too long."""


def outcome(name, seed, number):
    """What became of one input: accepted, refused, or a fault's text."""
    rng, errors = random.Random((seed << 40) + (digest(name) << 20) + number), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        here, aside = pathlib.Path(folder) / "in", pathlib.Path(folder) / "cwd"
        here.mkdir(), aside.mkdir()
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(aside):
                INPUTS[name](rng, here)
            result = "accepted"
        except UserError as error:
            result = "refused" if str(error).strip() else "an empty message"
        except SystemExit as stop:
            lines = errors.getvalue().splitlines()
            told = stop.code == 0 or (stop.code == 2 and lines and lines[-1].startswith("error: "))
            result = "refused" if told else f"exit {stop.code}: {lines[-3:]}"
        except Hang:
            result = f"no result in {SECONDS} s"
        except AssertionError as error:
            result = str(error)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        left = [path.name for path in aside.iterdir()]
    return f"left behind: {left}" if left else result


@pytest.fixture(autouse=True)
def alarm():
    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", INPUTS)
def test_mutated_inputs_end_in_a_result_or_one_line(name, request):
    seed, only = request.config.getoption("--fuzz-seed"), request.config.getoption("--fuzz-only")
    count = -(-request.config.getoption("--fuzz-inputs") // len(INPUTS))
    numbers = range(count) if only is None else [int(only.split(":")[1])] if only.startswith(f"{name}:") else []
    found, faults = collections.Counter(), []
    for number in numbers:
        signal.alarm(SECONDS)
        result = outcome(name, seed, number)
        signal.alarm(0)
        found[result if result in ("accepted", "refused") else "fault"] += 1
        if result not in ("accepted", "refused"):
            faults.append(f"--fuzz-only {name}:{number}: {result[:300]}")
    print(name, dict(found))
    assert not faults, f"{len(faults)} of {count} with --fuzz-seed {seed}\n" + "\n".join(faults[:20])


@pytest.mark.parametrize("name", INPUTS)
def test_some_inputs_reach_the_end(name):
    """Mutations that are always refused at the door would test the door alone."""
    results = [outcome(name, 0, number) for number in range(40)]
    assert "accepted" in results and "refused" in results
