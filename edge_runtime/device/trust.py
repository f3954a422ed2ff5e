"""Which servers a device talks to, and whose certificates it believes. TLS 1.2 or newer.

Plain http is for this machine, or where the user has said so. A certificate that is not believed ends the command with
one line: a device that waited for it as for a server that is away would wait for ever, and nobody would know.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from edge_runtime.device.errors import CorruptFileError, InputError, TransportError, UntrustedServerError
from edge_runtime.device.records import Identity

_MAX_CA_BYTES = 256 << 10  # it lies in identity.json; a CA is 2 KiB
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_NOT_YET_VALID = 9  # X509_V_ERR_CERT_NOT_YET_VALID of OpenSSL
_NOT_TLS = ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION", "HTTP_REQUEST")


def check_server(url: str, *, insecure_http: bool = False) -> str:
    """The origin of a server's address.

    Raises:
        InputError: not an http(s) origin, or plain http to another machine without being allowed.
    """
    parts = urlsplit(url.strip())
    try:
        port = parts.port
    except ValueError as error:
        raise InputError(f"server {url!r}: its port is not a number from 0 to 65535") from error
    plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    if not plain or parts.path not in ("", "/") or parts.username is not None:
        raise InputError(f"server {url!r}: expected an address like https://host:port, and nothing after it")
    host = str(parts.hostname)
    if parts.scheme == "http" and not (insecure_http or _is_loopback(host)):
        raise InputError(f"server {url!r}: plain http leaves this machine: use https, or say --insecure-http")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + (f":{port}" if port is not None else "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_ca(path: Path) -> str:
    """The certificates of a PEM file, and nothing else of it.

    Raises:
        InputError: it cannot be read, holds no certificate, or holds a private key, which a device must not have.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CA_BYTES + 1).decode("latin-1")
    except OSError as error:
        raise InputError(f"--ca {path}: cannot be read: {error.strerror}") from error
    if len(text) > _MAX_CA_BYTES:
        raise InputError(f"--ca {path}: expected at most {_MAX_CA_BYTES} bytes: give the server's CA alone")
    if "PRIVATE KEY-----" in text:
        raise InputError(f"--ca {path}: holds a private key: give the certificate alone, and keep the key at home")
    found = "".join(certificate + "\n" for certificate in _CERTIFICATE.findall(text))
    try:
        if not found:
            raise ValueError("nothing between BEGIN CERTIFICATE and END CERTIFICATE")
        _context(found)
    except (ssl.SSLError, ValueError) as error:
        raise InputError(f"--ca {path}: holds no certificate in PEM form") from error
    return found


def tls_of(identity: Identity) -> ssl.SSLContext | None:
    """What connections to an identity's server are made with; None for plain http.

    Raises:
        InputError: plain http to another machine, which nobody has allowed.
        CorruptFileError: the certificates it keeps are none.
    """
    try:
        origin = check_server(identity.server, insecure_http=identity.insecure_http)
    except InputError as error:
        raise InputError(f"{error} to 'emberlora edge trust'") from error
    if not origin.startswith("https:"):
        return None
    try:
        return _context(identity.ca)
    except (ssl.SSLError, ValueError) as error:
        raise CorruptFileError("identity.json: damaged: its CA is no certificate in PEM form") from error


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca or None)  # without one: the system's
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # a server's own certificate may be given as its CA
    return context


def tls_failure(server: str, error: Exception) -> UntrustedServerError | TransportError:
    """What a failed handshake means: an error that ends the command, or one that may pass."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message.rstrip(".")
        if error.verify_code == _NOT_YET_VALID:  # a board without a battery; the next time service mends its clock
            return TransportError(f"{server}: its {why}: is this device's clock right?")
        return UntrustedServerError(
            f"{server}: its certificate is not to be trusted: {why}: correct it there, or name the CA that signed it: "
            "'emberlora edge enroll … --ca FILE', 'emberlora edge trust --ca FILE' where this device is enrolled"
        )
    if getattr(error, "reason", None) in _NOT_TLS:
        return UntrustedServerError(f"{server}: does not speak TLS 1.2 or newer: is its address right, port and https?")
    return TransportError(f"{server}: no TLS connection: {error}")
