"""Makes certificates: of an authority (CA), and those that it issues for servers and clients.

Keys are on the elliptic curve P-256. All of it is for a trial, or for one run; an organisation has
an authority of its own.

Not covered: revoking certificates; keys with a password.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from switokd.errors import UsageError

CLOCK_TOLERANCE = timedelta(minutes=10)
"""How long before now a certificate is valid, because clocks differ."""


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key, both in PEM format."""

    certificate: bytes
    key: bytes


class Authority:
    """A CA that issues certificates for as many days as it is told.

    made: its certificate and key, such as those read from files; ValueError if they are none.
    """

    def __init__(self, made: Issued) -> None:
        self.made = made
        self._certificate = x509.load_pem_x509_certificate(made.certificate)
        key = serialization.load_pem_private_key(made.key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the key of the CA is not on an elliptic curve")
        if key.public_key() != self._certificate.public_key():
            raise ValueError("the key is not that of the certificate")
        self._key = key

    @classmethod
    def new(cls, days: float) -> Authority:
        """Make a CA. days: how long its certificate is valid."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("switokd CA")
        builder = _builder(name, name, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        builder = builder.add_extension(_usage(signs_certificates=True), True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, False)
        return cls(_issued(builder.sign(key, hashes.SHA256()), key))

    @property
    def expires(self) -> datetime:
        """When the CA's certificate expires."""
        return self._certificate.not_valid_after_utc

    def server(self, hosts: Sequence[str], days: float) -> Issued:
        """Issue a certificate for a server. hosts: all names and IP addresses of it.

        UsageError if one of them cannot be in a certificate.
        """
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        return self._issue(hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, days, names)

    def client(self, name: str, days: float) -> Issued:
        """Issue a certificate for a client."""
        return self._issue(name, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def _issue(
        self,
        name: str,
        use: x509.ObjectIdentifier,
        days: float,
        names: x509.SubjectAlternativeName | None = None,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self._certificate.subject, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_usage(signs_certificates=False), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority, False)
        if names is not None:
            builder = builder.add_extension(names, False)
        return _issued(builder.sign(self._key, hashes.SHA256()), key)


def check_hosts(hosts: Sequence[str]) -> None:
    """UsageError if a name or IP address cannot be in a certificate."""
    for host in hosts:
        _general_name(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - CLOCK_TOLERANCE)
        .not_valid_after(end)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    bare = host.strip("[]")
    try:
        return x509.IPAddress(ip_address(bare))
    except ValueError:
        pass
    try:
        if not bare or any(c.isspace() or c in ":/" for c in bare):
            raise ValueError
        return x509.DNSName(bare)
    except ValueError:
        raise UsageError(
            f"{host!r} cannot be in a certificate: name a host by its DNS name or IP address, "
            "without a port"
        ) from None


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    pem = serialization.Encoding.PEM
    return Issued(
        certificate.public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
