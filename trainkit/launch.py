"""torchrun as launch.sh starts it: the same options, but the workers' exit code becomes its own, without tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_REPORTED = (2, 130, 143)  # a user's mistake, Ctrl-C, SIGTERM: the worker has printed its one line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs workers; returns 0, 130 or 143 after a signal to any process, 2 after a user's mistake; other errors are torchrun's.

    torchrun itself ends with code 1 and its own traceback in all of these cases.
    """
    try:
        run(parse_args(sys.argv[1:] if argv is None else argv))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code not in _REPORTED:
            raise
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
