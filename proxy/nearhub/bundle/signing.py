"""Signatures of bundles: Ed25519 in minisign's format, so that `minisign -V` checks ours and `minisign -S` makes them.

Public keys of minisign and of signify are the same bytes; a signature that signify made is taken too.
https://jedisct1.github.io/minisign/#signature-format
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nearhub.errors import BundleRefused

_KEY, _HASHED, _PLAIN = b"Ed", b"ED", b"Ed"
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
_OURS = "signature of a bundle of nearhub"
_MOST = 4096
"""Bytes of a file of these."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`id`: 8 bytes, which tell keys apart and prove nothing. `raw`: 32 bytes."""

    id: bytes
    raw: bytes

    def __str__(self) -> str:
        return base64.b64encode(_KEY + self.id + self.raw).decode()

    @property
    def name(self) -> str:
        """As minisign prints it."""
        return self.id[::-1].hex().upper()


@dataclass(frozen=True, slots=True)
class SecretKey:
    public: PublicKey
    seed: bytes = field(repr=False)


def new_key() -> SecretKey:
    key = Ed25519PrivateKey.generate()
    return SecretKey(PublicKey(os.urandom(8), key.public_key().public_bytes_raw()), key.private_bytes_raw())


def read_public(text: str) -> PublicKey:
    """A key's line, or a file of minisign or signify that holds one. Raises BundleRefused."""
    raw = _decoded(text.strip().splitlines()[-1] if text.strip() else "", 42)
    if raw is None or raw[:2] != _KEY:
        raise BundleRefused("is no public key of minisign or signify: one is 56 letters that begin with RW")
    return PublicKey(raw[2:10], raw[10:])


def public_file(key: PublicKey) -> str:
    return f"{_UNTRUSTED}minisign public key {key.name}\n{key}\n"


def read_secret(text: str) -> SecretKey:
    """minisign's file of a secret key, without a password. Raises BundleRefused."""
    lines = text.splitlines()
    raw = _decoded(lines[1] if len(lines) > 1 else "", 158)
    if raw is None or raw[:2] != _KEY or raw[4:6] != b"B2":
        raise BundleRefused("is no secret key of minisign: make one by nearhub keygen, or minisign -G -W")
    if raw[2:4] != b"\0\0":
        raise BundleRefused("is locked by a password: make one without by nearhub keygen, or minisign -G -W")
    key_id, seed, public = raw[54:62], raw[62:94], raw[94:126]  # minisign has no checksum where there is no password
    if Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() != public:
        raise BundleRefused("is damaged: its two halves are not of one key")
    return SecretKey(PublicKey(key_id, public), seed)


def secret_file(key: SecretKey) -> str:
    body = key.public.id + key.seed + key.public.raw
    raw = _KEY + b"\0\0" + b"B2" + bytes(32 + 8 + 8) + body + bytes(32)
    return f"{_UNTRUSTED}minisign secret key {key.public.name}, without a password\n{base64.b64encode(raw).decode()}\n"


def sign(key: SecretKey, data: bytes, comment: str) -> bytes:
    """The text of a signature file. `comment` is signed too."""
    private = Ed25519PrivateKey.from_private_bytes(key.seed)
    comment = f"{_OURS}: {comment}"
    signature = private.sign(hashlib.blake2b(data).digest())
    overall = private.sign(signature + comment.encode())
    lines = (
        f"{_UNTRUSTED}{_OURS}, by {key.public.name}",
        base64.b64encode(_HASHED + key.public.id + signature).decode(),
        f"{_TRUSTED}{comment}",
        base64.b64encode(overall).decode(),
    )
    return ("\n".join(lines) + "\n").encode()


def verify(keys: Sequence[PublicKey], data: bytes, signature_file: bytes) -> PublicKey:
    """Who of `keys` signed `data`. Raises BundleRefused when nobody did."""
    try:
        lines = signature_file.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        lines = []
    if len(signature_file) > _MOST or len(lines) not in (2, 4) or not lines[0].startswith(_UNTRUSTED):
        raise BundleRefused("the signature is damaged: it is not in minisign's format")
    raw = _decoded(lines[1], 74)
    if raw is None or raw[:2] not in (_HASHED, _PLAIN):
        raise BundleRefused("the signature is damaged: it is not in minisign's format")
    key = next((key for key in keys if key.id == raw[2:10]), None)
    if key is None:
        known = ", ".join(key.name for key in keys) or "none"
        raise BundleRefused(f"the bundle is signed by {PublicKey(raw[2:10], b'').name}, and trusted are: {known}")
    public = Ed25519PublicKey.from_public_bytes(key.raw)
    try:
        public.verify(raw[10:], hashlib.blake2b(data).digest() if raw[:2] == _HASHED else data)
        if len(lines) == 4:
            overall = _decoded(lines[3], 64)
            if overall is None or not lines[2].startswith(_TRUSTED):
                raise InvalidSignature
            comment = lines[2].removeprefix(_TRUSTED)
            public.verify(overall, raw[10:] + comment.encode())
            # Nothing signs the first line; but where the third says that we wrote it, it is known.
            if comment.startswith(_OURS) and lines[0] != f"{_UNTRUSTED}{_OURS}, by {key.name}":
                raise InvalidSignature
    except InvalidSignature:
        raise BundleRefused(f"the signature by {key.name} is wrong: the manifest or the signature was changed") from None
    return key


def _decoded(line: str, length: int) -> bytes | None:
    """The bytes of base64 as it is written, or None."""
    try:
        raw = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return None
    return raw if len(raw) == length and base64.b64encode(raw).decode() == line else None


def read_key_file(path: Path) -> str:
    """Raises BundleRefused."""
    try:
        if path.stat().st_size > _MOST:
            raise BundleRefused(f"{path} is too long for a key")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BundleRefused(f"{path} cannot be read: {exc}") from exc


def secret_from(path: Path) -> SecretKey:
    """Raises BundleRefused, which names the file."""
    try:
        return read_secret(read_key_file(path))
    except BundleRefused as exc:
        raise BundleRefused(exc.message if str(path) in exc.message else f"{path} {exc.message}") from None


def public_from(text: str) -> PublicKey:
    """A key, or the name of a file of one. Raises BundleRefused."""
    if _decoded(text.strip(), 42) is not None:
        return read_public(text)
    try:
        return read_public(read_key_file(Path(text)))
    except BundleRefused as exc:
        raise BundleRefused(exc.message if text in exc.message else f"{text} {exc.message}") from None
