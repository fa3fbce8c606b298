"""Runs the application on a socket until SIGTERM or Ctrl-C; texts that are being decoded then have some seconds to end."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn
from starlette.applications import Starlette

from trainkit.errors import UserError
from trainkit.serve.engine import Engine

GRACE = 30.0
"""Seconds that texts have to end after SIGTERM."""
STALLED_MS = 60_000
"""Milliseconds after which a connection is dropped if its client reads nothing although data is waiting."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address; it refuses connections until the server listens.

    Raises:
        UserError: the address is in use, reserved, or not an address of this machine.
    """
    if not 0 <= port < 65536:
        raise UserError(f"port {port}: must be from 0 to 65535; 0 takes any free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise UserError(f"host {host}, port {port}: {reason}; choose another port, or an address of this machine") from None
    return bound


class Server(uvicorn.Server):
    """A uvicorn server that says when it listens, and tells the engine when it begins to stop.

    Args:
        app: The application.
        engine: The engine behind it.
        ready: Line for stderr once connections are accepted; none if it is empty.
        grace: Seconds that open texts have to end after the server begins to stop.
    """

    def __init__(self, app: Starlette, engine: Engine, ready: str = "", grace: float = GRACE) -> None:
        patience = int(grace) + 5  # for clients that do not read what is left
        config = uvicorn.Config(
            app, log_level=logging.WARNING, access_log=False, lifespan="on", timeout_graceful_shutdown=patience, ws="none"
        )
        super().__init__(config)
        self.engine, self.ready, self.grace = engine, ready, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen; programs that wait for the line may connect at once."""
        await super().startup(sockets)
        if self.started and self.ready:
            print(self.ready, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting requests, and waits for the open ones."""
        self.engine.stop(self.grace)
        await super().shutdown(sockets)
