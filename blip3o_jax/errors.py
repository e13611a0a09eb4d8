"""The one exception for a user's mistake, and how a command line reports it."""

import contextlib
import os
import sys


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
