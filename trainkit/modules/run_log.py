"""Messages of the libraries (Lightning, transformers, Python warnings): to log.txt in the run folder, not to the terminal."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from pathlib import Path

LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "py.warnings")


class RunLog(logging.handlers.MemoryHandler):
    """Holds messages in memory until `write_to` names their file. Ranks other than 0, and runs without a folder, drop them."""

    def __init__(self) -> None:
        super().__init__(capacity=1000, flushLevel=sys.maxsize, flushOnClose=False)

    def write_to(self, file: Path) -> None:
        """Appends all messages to `file`, those before this call included."""
        handler = logging.FileHandler(file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        handler.handleError = lambda record: None  # a full disk is reported by what fails because of it
        self.setTarget(handler)
        self.capacity = 1
        self.flush()

    def close(self) -> None:
        if self.target is not None:
            self.target.close()
        super().close()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[RunLog]:
    """Within the context, messages of the libraries go to the yielded log in place of the terminal."""
    from transformers.utils import logging as transformers_logging  # not before a command needs it

    log = RunLog()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # a run has one progress bar, its own
    logging.captureWarnings(True)
    for logger in loggers:
        logger.handlers, logger.propagate = [log], False
    try:
        yield log
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if bars:
            transformers_logging.enable_progress_bar()
        log.close()
