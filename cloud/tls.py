"""The aggregator's certificate: read once at the start, checked whole, and pinned by the operator's commands."""

from __future__ import annotations

import hashlib
import ssl

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloud.config import Config
from cloud.errors import ConfigError


def server_context(config: Config) -> ssl.SSLContext | None:
    """What a server with a certificate listens with, TLS 1.2 or newer; None without one.

    Raises:
        ConfigError: the files cannot be read, are no certificate or key, or do not belong together.
    """
    if config.tls_files is None:
        return None
    certificate, key = config.tls_files
    fingerprint(config)  # names what is wrong with the certificate alone
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        why = f"not an unencrypted key in PEM form that belongs to {certificate}"
        raise ConfigError(f"server.tls_key: {key}: {why} ({error.reason or error})") from error
    except OSError as error:
        raise ConfigError(f"server.tls_key: {key}: cannot be read: {error.strerror}") from error
    return context


def fingerprint(config: Config) -> str | None:
    """SHA-256 of the server's own certificate, the first of its file, hex; None without one.

    Raises:
        ConfigError: it cannot be read or is none.
    """
    if config.tls_files is None:
        return None
    path = config.tls_files[0]
    try:
        own = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except OSError as error:
        raise ConfigError(f"server.tls_cert: {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"server.tls_cert: {path}: holds no certificate in PEM form") from error
    return hashlib.sha256(own.public_bytes(Encoding.DER)).hexdigest()


def _no_password() -> str:
    return ""  # without this OpenSSL asks at the terminal
