"""Which addresses stay on this machine, and where the coordinator finds its tokens.

Not covered: names that the resolver maps to loopback; they count as other machines.
"""

from __future__ import annotations

from ipaddress import ip_address

WORKER_TOKEN = "SWITOKD_WORKER_TOKEN"
OPERATOR_TOKEN = "SWITOKD_OPERATOR_TOKEN"
"""Environment variables of the coordinator with a token, where no file names one."""


def is_loopback(host: str) -> bool:
    """Return whether nothing that is sent to a host leaves this machine.

    host: a name or an IP address, an IPv6 address with or without brackets.
    """
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ip_address(bare).is_loopback
    except ValueError:  # a name
        return False


def host_of(address: str) -> str:
    """Return the host of HOST:PORT, an IPv6 address without its brackets."""
    return address.rpartition(":")[0].strip("[]")
