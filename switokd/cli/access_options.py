"""Options of `switokd coordinator` for TLS and tokens.

Not covered: what they protect (`services/coordinator/access.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from switokd.errors import UsageError

if TYPE_CHECKING:
    from switokd.services.coordinator.access import Access


def _file(help: str) -> Any:
    return typer.Option(metavar="FILE", help=help)


CERTIFICATE_HELP = (
    "Certificate of both ports, in PEM format; makes them speak TLS. Read again when it changes."
)
KEY_HELP = "Private key of --tls-certificate."
CLIENT_CA_HELP = "Ask every caller for a certificate that this CA has issued."
WORKER_HELP = (
    "Tokens of workers, one a line: only who sends one may train. Read again when it changes. "
    "Instead of the file: the environment variable SWITOKD_WORKER_TOKEN."
)
OPERATOR_HELP = (
    "Tokens of operators, who may also command runs and the coordinator; or the environment "
    "variable SWITOKD_OPERATOR_TOKEN."
)
METRICS_HELP = "Tokens that /metrics asks for; without it everyone may read the metrics."
HTTP_HOST_HELP = "Address of the HTTP port, if another than --host; on 127.0.0.1 without TLS."
PLAINTEXT_HELP = "Let other machines in without TLS, on a network where everyone is trusted."
REFLECTION_HELP = "Answer gRPC reflection: anyone who reaches the port may ask for the contract."


def access_options(
    http_host: Annotated[str, typer.Option(help=HTTP_HOST_HELP, show_default=False)] = "",
    tls_certificate: Annotated[Optional[Path], _file(CERTIFICATE_HELP)] = None,  # noqa: UP045
    tls_key: Annotated[Optional[Path], _file(KEY_HELP)] = None,  # noqa: UP045
    tls_client_ca: Annotated[Optional[Path], _file(CLIENT_CA_HELP)] = None,  # noqa: UP045
    worker_token_file: Annotated[Optional[Path], _file(WORKER_HELP)] = None,  # noqa: UP045
    operator_token_file: Annotated[Optional[Path], _file(OPERATOR_HELP)] = None,  # noqa: UP045
    metrics_token_file: Annotated[Optional[Path], _file(METRICS_HELP)] = None,  # noqa: UP045
    allow_plaintext: Annotated[
        bool, typer.Option("--allow-plaintext", help=PLAINTEXT_HELP)
    ] = False,
    reflection: Annotated[bool, typer.Option("--reflection", help=REFLECTION_HELP)] = False,
) -> Access:
    """Return how the ports are protected; UsageError if the options do not fit together."""
    from switokd.services.coordinator.access import Access, tokens_of
    from switokd.services.coordinator.addresses import OPERATOR_TOKEN, WORKER_TOKEN
    from switokd.services.coordinator.security import Security
    from switokd.services.coordinator.tls import Certificates, TlsFiles

    if (tls_certificate is None) != (tls_key is None):
        raise UsageError("--tls-certificate and --tls-key belong together: give both, or none")
    certificates = None
    if tls_certificate and tls_key:
        certificates = Certificates(TlsFiles(tls_certificate, tls_key, tls_client_ca))
    elif tls_client_ca:
        raise UsageError("--tls-client-ca needs --tls-certificate and --tls-key")
    return Access(
        Security(
            tokens_of("--worker-token-file", worker_token_file, WORKER_TOKEN),
            tokens_of("--operator-token-file", operator_token_file, OPERATOR_TOKEN),
        ),
        certificates,
        tokens_of("--metrics-token-file", metrics_token_file),
        http_host,
        allow_plaintext,
        reflection,
    )
