"""The one exception for a user's mistake, and how a command line reports it."""

import contextlib
import os
import select
import signal
import sys
import threading
import traceback


class UserError(ValueError):
    """A mistake of the user's: one line, no traceback.

    Args:
      what: is wrong; alone, or with `got`. Without the others it is a finished message, as pickling and absl pass it.
      expected: in its place.
      do: what to do about it.
      got: the value at hand.
    """

    def __init__(self, what: str, *, expected: object = None, do: str | None = None, got: object = None):
        what = what if got is None else f"{what}: got {got}"
        super().__init__(what if do is None else f"{what} - expected {expected} - {do}")


class NoAnswer(UserError):
    """A call that never came back; what it has started may still be running."""


def require(good: bool, what: str, got: object, expected: object, do: str = "change it") -> None:
    """Raises UserError unless `good`."""
    if not good:
        raise UserError(what, got=got, expected=expected, do=do)


class Terminated(BaseException):
    """SIGTERM came."""


@contextlib.contextmanager
def reported(debug: bool = False):
    """Ends the process in one line on stderr: exit code 2 for a mistake, 130 for Ctrl-C, 143 for SIGTERM.

    Where the reader of stdout has gone, as `head` does, it ends without a line, with 141 as if by SIGPIPE.

    Args:
      debug: raise instead, with the traceback.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if main else None
    try:
        yield
        _flush()  # what fails now would fail without a line when Python ends
    except (KeyboardInterrupt, Terminated) as error:
        if debug:
            raise
        name, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        print(f"{name}: nothing half-written was left behind", file=sys.stderr, flush=True)
        os._exit(code)  # threads of a running computation must not hold the exit back
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError) and _reader_gone():
            os._exit(141)
        print(f"error: {' '.join(told(error).split())}", file=sys.stderr, flush=True)
        _drop_output()
        if isinstance(error, NoAnswer):
            os._exit(2)  # an ordinary exit would wait for it
        sys.exit(2)
    finally:
        sys.unraisablehook = hook
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def _reader_gone() -> bool:
    """Whether stdout is a pipe without a reader."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file behind stdout
        return False


def _drop_output() -> None:
    """Drops what cannot be printed, so that Python ends without a word on it."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    if sys.stdout is not None:  # None: closed by the shell
        sys.stdout.flush()


def type_of(value: object) -> str:
    """The name of a value's type with its article, such as "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def placed(error: Exception) -> str:
    """An exception in one line: its type, its message, and the file and line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).split("\n")[0][:300]
    return f"{type(error).__name__}: {message} ({os.path.basename(place.filename)}:{place.lineno})"


def told(error: Exception) -> str:
    """The message of an exception: a user's mistake as it is, any other error with its type and place."""
    if isinstance(error, UserError):
        return str(error)
    message = str(error).split("\n")[0][:300]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower():
        return f"memory: {message or 'none left'} - expected room for the program - take a smaller batch, size or model"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'input or output'}: {error.strerror} - expected it to work - check place and rights"
    return f"{placed(error)} - expected no such fault - --debug shows where it comes from"


def _interrupt_again(unraisable) -> None:
    """Python drops what is raised in a finalizer or while garbage is collected, where jax has much to do: a signal that
    comes just then is sent once more, shortly after."""
    number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        return sys.__unraisablehook__(unraisable)
    again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()
