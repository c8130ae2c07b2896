"""Loopback ports of this machine: which are free, before a server is told to take one.

A server that finds its port taken says so in words of its own, some after a minute.
"""

from __future__ import annotations

import socket

__all__ = ["HIGHEST_PORT", "any_free_port", "is_free"]

HIGHEST_PORT = 65535


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As the servers do: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def any_free_port() -> int:
    """Find a port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
