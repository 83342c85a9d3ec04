"""Ports for processes that listen later than they are told where."""

import errno
import random
import socket

FIRST, LAST = 20_000, 32_000
"""Below the ports that a system gives to who asks for any: from 32768 on Linux, from 49152 on macOS and Windows."""


def port_for_later() -> int:
    """A port that is free, and that no other test gets meanwhile by asking for any."""
    draw = random.SystemRandom()  # hypothesis gives every process of tests the same random numbers
    while True:
        port = draw.randrange(FIRST, LAST)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        return port
