"""Ed25519, by the cryptography package: notes are signed here and nowhere else, and their signatures checked."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from nearhub.errors import BadProof
from nearhub.wire.tlog import Checkpoint, LogKey, Note, Signature


class Signer:
    """A name, and a private key that never leaves."""

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.key = LogKey(name, private.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"<Signer {self.key}>"

    def sign(self, text: str) -> Note:
        return Note(text, (Signature(self.key.name, self.key.id, self._private.sign(text.encode())),))


def new_private_key() -> bytes:
    """PEM, unencrypted."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Raises BadProof for anything else than an Ed25519 key in PEM."""
    try:
        private = load_pem_private_key(pem, None)
    except (ValueError, TypeError):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise BadProof("it holds no Ed25519 key in PEM")
    return private


def checked(note: str, key: LogKey, what: str = "the checkpoint") -> Checkpoint:
    """The checkpoint in a note that `key` signed. Raises BadProof, saying what is wrong with `what`."""
    read = Note.from_text(note)
    mine = [one for one in read.signatures if (one.name, one.key_id) == (key.name, key.id)]
    if not mine:
        signers = ", ".join(f"{one.name} ({one.key_id.hex()})" for one in read.signatures)
        raise BadProof(f"{what} is not signed by {key.name} ({key.id.hex()}), but by {signers[:200]}")
    try:
        for one in mine:
            Ed25519PublicKey.from_public_bytes(key.public).verify(one.data, read.text.encode())
    except (InvalidSignature, ValueError):
        raise BadProof(f"{what} has a wrong signature: it was changed, or another key signed it") from None
    checkpoint = Checkpoint.from_text(read.text)
    if checkpoint.origin != key.name:
        raise BadProof(f"{what} is of the log {checkpoint.origin!r}, and the key is that of {key.name!r}")
    return checkpoint
