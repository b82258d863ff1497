"""The section `coordinator.tls` of a run file.

Not covered: reading the files (`coordination/credentials.py`).
"""

from __future__ import annotations

from pydantic import model_validator

from switokd.config.base import KeyText, Section


class Tls(Section):
    """How the ranks reach a coordinator with TLS: files with certificates, in PEM format."""

    ca: KeyText | None = None
    """Certificate of the authority that has issued the coordinator's certificate; null: no TLS."""
    certificate: KeyText | None = None
    """Certificate of the ranks, for a coordinator that asks for one; null: none."""
    key: KeyText | None = None
    """Private key of `certificate`; null: none."""

    @model_validator(mode="after")
    def _check_files(self) -> Tls:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: set both, or none")
        if self.certificate and not self.ca:
            raise ValueError("certificate needs ca, with which the ranks check the coordinator")
        return self
