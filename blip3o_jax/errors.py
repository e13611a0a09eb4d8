"""The one exception for a user's mistake, and how a command line reports it."""

import contextlib
import os
import sys


class UserError(ValueError):
    """A mistake of the user's: one line, `what - got - expected - what to do`, no traceback."""


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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses absl flags for `app.run(main, flags_parser=parse_flags)`: a mistake ends in one line and exit code 2."""
    from absl import flags

    try:
        return flags.FLAGS(arguments)
    except KeyError as mistake:  # of a configuration within `--config`
        told = f"--config: no key {mistake} - expected one of the configuration - correct the flag"
    except (flags.Error, AttributeError, TypeError, ValueError) as mistake:
        told = str(mistake).rpartition("Error: ")[2]  # a mistake within a configuration file comes with its traceback
    print(f"error: {' '.join(told.replace(chr(92) + 'n', ' ').split())}", file=sys.stderr)
    sys.exit(2)
