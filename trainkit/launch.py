"""torchrun, as launch.sh starts it: the same options; what its workers ended with is its own exit code, without tracebacks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

_SAID = (2, 130, 143)  # a user's mistake, Ctrl-C, SIGTERM: the worker has said all in a line


def main(argv: Sequence[str] | None = None) -> int:
    """Runs workers; returns 0, 130 or 143 after a signal to any process, 2 after a user's mistake, otherwise as torchrun.

    torchrun itself ends with 1 and a traceback of its own in all of these.
    """
    try:
        run(parse_args(sys.argv[1:] if argv is None else argv))
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        if code not in _SAID:
            raise
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
