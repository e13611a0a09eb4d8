"""The one exception for a user's mistake, and how a command line reports it."""

import contextlib
import os
import signal
import sys
import threading


class UserError(ValueError):
    """A mistake of the user's: one line, `what - got - expected - what to do`, no traceback."""


class NoAnswer(UserError):
    """A call that never came back; what it has started may still be running."""


@contextlib.contextmanager
def reported(debug: bool = False):
    """Ends the process in one line on stderr: exit code 2 for a mistake, 130 for Ctrl-C.

    Args:
      debug: raise instead, with the traceback.
    """
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted: nothing half-written was left behind", file=sys.stderr, flush=True)
        os._exit(130)  # threads of a running computation must not hold the exit back
    except (UserError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        if isinstance(error, NoAnswer):
            sys.stdout.flush()
            os._exit(2)  # an ordinary exit would wait for it
        sys.exit(2)
    finally:
        sys.unraisablehook = hook


def _interrupt_again(unraisable) -> None:
    """Python drops what is raised in a finalizer or while garbage is collected, where jax has much to do: a Ctrl-C that
    comes just then is sent once more, shortly after."""
    if unraisable.exc_type is not KeyboardInterrupt:
        return sys.__unraisablehook__(unraisable)
    again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    again.daemon = True
    again.start()
