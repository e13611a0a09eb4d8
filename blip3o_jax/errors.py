"""The exception for user mistakes, and error reporting of command lines."""

import contextlib
import difflib
import errno
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

FULL = (os.strerror(errno.ENOSPC), "Not enough disk space")
"""Messages of a full disk: the system's, also when C++ libraries pass it on, and that of TFDS before it writes."""

PACKAGE = os.path.dirname(__file__) + os.sep


class UserError(ValueError):
    """A user's mistake, reported in one line without a traceback: `what: got ... - expected ... - do`.

    `what` alone is the complete message, as in unpickling; `do` says how to fix it.
    """

    def __init__(self, what: str, *, expected: object = None, do: str | None = None, got: object = None):
        what = what if got is None else f"{what}: got {got}"
        super().__init__(what if do is None else f"{what} - expected {expected} - {do}")


class NoAnswer(UserError):
    """A call that timed out; its thread may still be running."""


def require(good: bool, what: str, got: object, expected: object, do: str = "change it") -> None:
    """Raises UserError unless `good`."""
    if not good:
        raise UserError(what, got=got, expected=expected, do=do)


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Returns advice for an unknown name: the most similar known one, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


class Terminated(BaseException):
    """Raised on SIGTERM."""


@contextlib.contextmanager
def reported(debug: bool = False):
    """Reports exceptions in one line on stderr and exits: code 2 for errors, 130 for Ctrl-C, 143 for SIGTERM.

    If the reader of stdout has closed it, as `head` does, exits silently with 141, as by SIGPIPE. With `debug`, raises
    with the traceback instead.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _discarded
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if main else None
    if not debug:  # asynchronous writers that Ctrl-C has ended
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    try:
        yield
        _flush()  # a failure at interpreter exit would not be reported
    except (KeyboardInterrupt, Terminated) as error:
        if debug:
            raise
        name, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        print(f"{name}: nothing half-written was left behind", file=sys.stderr, flush=True)
        os._exit(code)  # does not wait for threads of a running computation
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError) and _reader_gone():
            os._exit(141)
        print(f"error: {' '.join(told(error).split())}", file=sys.stderr, flush=True)
        if _disk_is_full(error):
            hook = _discarded  # until the end: open files fail again when Python closes them
        _drop_output()
        if isinstance(error, NoAnswer):
            os._exit(2)  # a normal exit would wait for the thread
        sys.exit(2)
    finally:
        sys.unraisablehook = hook
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _reader_gone() -> bool:
    """Whether stdout is a pipe whose reader has closed it."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or stdout is not a file
        return False


def _drop_output() -> None:
    """Discards output that cannot be printed, so that Python exits without another message."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    if sys.stdout is not None:  # None: closed by the shell
        sys.stdout.flush()


def type_of(value: object) -> str:
    """Names a value's type for messages, such as "an int", "a tuple of 2" or "an array float32[2, 3]"."""
    if value is None:
        return "None"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}[{', '.join(map(str, value.shape))}]"
    if type(value) is tuple:
        return f"a tuple of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def placed(error: BaseException, custom: bool = False) -> str:
    """Formats an exception in one line: type, message, file and line.

    Args:
      custom: name the innermost line in the file of the first code from outside the package, if there is any.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if custom:
        frames = [frame for frame in frames if not frame.filename.startswith((PACKAGE, "<"))]
        frames = [frame for frame in frames if frame.filename == frames[0].filename]
    message = ": ".join(filter(None, (type(error).__name__, str(error).split("\n")[0][:300])))
    return f"{message} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else message


def call_custom(what: str, function: Callable, *inputs: Any, passed: tuple[type[Exception], ...] = ()) -> Any:
    """Calls code from outside the package. Its exceptions become a UserError that names it and the line in its file.

    Args:
      what: name of the code, for the message.
      passed: exceptions that the caller handles; they and UserError are raised as they are.
    """
    try:
        return function(*inputs)
    except (UserError, *passed):
        raise
    except (Exception, SystemExit) as error:
        do = "correct it; --debug shows the traceback"
        raise UserError(what, got=placed(error, custom=True), expected="no exception", do=do) from error


def told(error: Exception) -> str:
    """Returns the message for an exception: that of a UserError, or type and place of any other error."""
    if isinstance(error, UserError):
        return str(error)
    message = str(error).split("\n")[0][:300]
    if _disk_is_full(error):
        return f"disk: {message} - expected room for the output - make room and run the same command again"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower():
        return f"memory: {message or 'none left'} - expected enough memory - use a smaller batch, size or model"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror} - expected access - check path and permissions"
    return f"{placed(error)} - expected no such error - run with --debug for the traceback"


def _disk_is_full(error: BaseException) -> bool:
    return any(text in str(error) for text in FULL)


def _discarded(unraisable) -> None:
    """Handles exceptions in finalizers and garbage collection, which Python discards; jax spends much time there.

    The signal of an interrupt is sent again. A full disk is reported where it is met first.
    """
    number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        return None if _disk_is_full(unraisable.exc_value) else sys.__unraisablehook__(unraisable)
    again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()
