"""Addresses of coordinators: one, or several among which each run has its own.

A run belongs to the coordinator that its id chooses (rendezvous hashing): everyone with the same
list finds the same one, without asking. If an address is added or taken away, only the runs that it
gains or loses move.

Not covered: moving a run that goes on to another coordinator.
"""

from __future__ import annotations

import hashlib
import re


def split_addresses(text: str) -> list[str]:
    """Return the addresses in "HOST:PORT,HOST:PORT"; ValueError if one is none."""
    addresses = [address.strip() for address in text.split(",")]
    for address in addresses:
        port = re.fullmatch(r"[^\s,]+:(\d{1,5})", address)
        if not (port and 0 < int(port[1]) < 65536):
            raise ValueError("HOST:PORT, or several separated by commas")
    return addresses


def choose_address(addresses: str, run_id: str) -> str:
    """Return the address of a run's coordinator. addresses: as for `split_addresses`."""
    return max(split_addresses(addresses), key=lambda address: (_weight(address, run_id), address))


def _weight(address: str, run_id: str) -> bytes:
    return hashlib.sha256(f"{address}\n{run_id}".encode()).digest()
