"""A certificate authority for development, and everything that `compose.secure.yaml` takes as a secret.

    python -m fedbasin.deploy.authority deploy/secrets --clients 5

An authority of your own that your machines trust takes its place where others join: the files keep their names.
"""

import argparse
import ipaddress
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

_DAYS = 90
_LOOPBACK = ("localhost", "127.0.0.1")
# The names under which each service is reached.
SERVICES = {"superlink": ("superlink",), "proxy": ("proxy",), "observer": ("observer", "reports", "metrics")}


@dataclass(frozen=True)
class Authority:
    """A certificate authority.

    Attributes:
        key: its private key, which is kept nowhere.
        certificate: its own certificate.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def sign(self, key: ec.EllipticCurvePrivateKey, names: Iterable[str]) -> x509.Certificate:
        """Return a certificate of a server that is reached under these names and addresses."""
        names = tuple(names)
        return (
            _builder(names[0], self.certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName(map(_general_name, names)), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def make_authority() -> Authority:
    """Return a new authority."""
    key = _new_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedbasin development authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    certificate = (
        _builder("fedbasin development authority", name, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def write_secrets(folder: Path, clients: int, hosts: Iterable[str] = ()) -> None:
    """Write certificates, keys of SuperNodes and the SuperExec's secret into a folder that only its owner may enter.

    The files in it are readable for everyone, because the users inside of the containers have other numbers.

    Args:
        folder: a folder that does not exist.
        clients: number of SuperNodes.
        hosts: names and addresses under which SuperNodes of other machines reach the proxy.

    Raises:
        FileExistsError: the folder exists; it may hold secrets that are in use.
    """
    folder.mkdir(mode=0o700, parents=True)
    nodes = folder / "nodes"
    nodes.mkdir()
    authority = make_authority()
    _write(folder / "authority.crt", _pem(authority.certificate))
    for service, names in SERVICES.items():
        key = _new_key()
        more = tuple(hosts) if service == "proxy" else ()
        _write(folder / f"{service}.crt", _pem(authority.sign(key, (*names, *_LOOPBACK, *more))))
        _write(folder / f"{service}.key", _private(key, PrivateFormat.PKCS8))
    _write(folder / "superexec", secrets.token_hex(32).encode())
    for index in range(clients):
        key = _new_key()
        _write(nodes / f"{index}.key", _private(key, PrivateFormat.OpenSSH))
        _write(nodes / f"{index}.pub", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))


def main() -> None:
    """Write the secrets of a federation."""
    parser = argparse.ArgumentParser(description="Make a development authority and the secrets of a federation.")
    parser.add_argument("folder", type=Path, help="folder to make, which must not exist")
    parser.add_argument("--clients", type=int, default=5, help="number of SuperNodes")
    parser.add_argument(
        "--host", action="append", default=[], help="name or address of the proxy elsewhere; repeatable"
    )
    options = parser.parse_args()
    if options.clients < 1:
        parser.error("--clients must be at least 1")
    try:
        write_secrets(options.folder, options.clients, options.host)
    except FileExistsError:
        parser.error(f"{options.folder} exists and may hold secrets that are in use; remove it, or name another folder")


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_DAYS))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o644)


if __name__ == "__main__":
    main()
