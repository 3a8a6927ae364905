"""A port that nobody listens at, for tests."""

import socket


def free_port() -> int:
    """A port of this machine that was free just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
