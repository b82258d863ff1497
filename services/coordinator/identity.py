"""What proves that a caller belongs to a run: the run's secret.

Rank 0 makes the secret and hands it to the other ranks. The coordinator keeps its SHA-256 digest,
in memory and in the journal. A secret has 32 random bytes, so that nobody can guess it from the
digest.

Not covered: tokens, which say who may use a coordinator at all (`security.py`).
"""

from __future__ import annotations

import hashlib
import hmac

from switokd.services.coordinator.refusal import Refusal

LEAST_BYTES, MOST_BYTES = 16, 256
"""Length of a secret; the clients of switokd use 32 bytes."""


class RunSecret:
    """The secret of one run, as its digest. digest: empty for a run without a secret."""

    def __init__(self, digest: bytes = b"") -> None:
        self.digest = digest

    @classmethod
    def of(cls, secret: bytes) -> RunSecret:
        """Return what to keep of a secret, which may be empty; Refusal if its length is wrong."""
        if not secret:
            return cls()
        if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
            raise Refusal(
                Refusal.Kind.INVALID_ARGUMENT,
                f"a run's secret has {LEAST_BYTES} to {MOST_BYTES} bytes, found {len(secret)}",
            )
        return cls(hashlib.sha256(secret).digest())

    def __bool__(self) -> bool:
        return bool(self.digest)

    def proves(self, secret: bytes) -> bool:
        """Return whether a caller has the run's secret; False for a run without one."""
        if not self.digest or len(secret) > MOST_BYTES:  # a long one would take long
            return False
        return hmac.compare_digest(hashlib.sha256(secret).digest(), self.digest)

    def check(self, secret: bytes, run_id: str) -> None:
        """Refusal unless a caller has the run's secret, or the run and the caller have none."""
        if self.proves(secret) or not (self.digest or secret):
            return
        problem = (
            "this run has a secret, and the call has none"
            if not secret
            else "this is not the run's secret"
            if self.digest
            else "this run was joined without a secret, and the call has one"
        )
        raise Refusal(
            Refusal.Kind.PERMISSION_DENIED,
            f"run {run_id!r}: {problem}; only ranks of the run have it (run.json in its folder)",
        )
