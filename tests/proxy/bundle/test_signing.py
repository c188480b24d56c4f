"""Signatures as minisign and signify make and check them."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.bundle.signing import (
    new_key,
    public_file,
    public_from,
    read_public,
    read_secret,
    secret_file,
    secret_from,
    sign,
    verify,
)
from nearhub.errors import BundleRefused

KEY = new_key()


def run(*command: str, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_minisign_verifies_ours(tmp_path: Path) -> None:
    """By our public key's file; and not once anything was changed."""
    (tmp_path / "key.pub").write_text(public_file(KEY.public))
    (tmp_path / "data").write_bytes(b"what is signed")
    (tmp_path / "data.minisig").write_bytes(sign(KEY, b"what is signed", "number 3"))
    told = run("minisign", "-V", "-p", str(tmp_path / "key.pub"), "-m", str(tmp_path / "data"))
    assert "Trusted comment: signature of a bundle of nearhub: number 3" in told
    (tmp_path / "data").write_bytes(b"what is signeD")
    run("minisign", "-V", "-p", str(tmp_path / "key.pub"), "-m", str(tmp_path / "data"), status=1)


def test_we_take_minisign_s_keys_and_signatures(tmp_path: Path) -> None:
    """Its secret key without a password signs here; what it signed with ours is verified here."""
    secret, public, data = tmp_path / "k", tmp_path / "k.pub", tmp_path / "data"
    run("minisign", "-G", "-W", "-p", str(public), "-s", str(secret))
    data.write_bytes(b"bytes")
    theirs = public_from(str(public))
    assert secret_from(secret).public == theirs
    assert verify([KEY.public, theirs], b"bytes", sign(secret_from(secret), b"bytes", "x")) == theirs
    secret.write_text(secret_file(KEY))
    for legacy in ([], ["-l"]):
        run("minisign", "-S", *legacy, "-W", "-s", str(secret), "-m", str(data), "-x", str(tmp_path / "sig"))
        assert verify([KEY.public], b"bytes", (tmp_path / "sig").read_bytes()) == KEY.public


def test_we_take_signify_s_keys_and_signatures(tmp_path: Path) -> None:
    run("signify-openbsd", "-G", "-n", "-p", str(tmp_path / "k.pub"), "-s", str(tmp_path / "k.sec"))
    (tmp_path / "data").write_bytes(b"bytes")
    run("signify-openbsd", "-S", "-s", str(tmp_path / "k.sec"), "-m", str(tmp_path / "data"), "-x", str(tmp_path / "sig"))
    key = public_from(str(tmp_path / "k.pub"))
    assert verify([key], b"bytes", (tmp_path / "sig").read_bytes()) == key
    with pytest.raises(BundleRefused, match="wrong"):
        verify([key], b"bytez", (tmp_path / "sig").read_bytes())


def test_every_flipped_bit_of_a_signature_is_found() -> None:
    signature = sign(KEY, b"data", "number 1")
    verify([KEY.public], b"data", signature)
    for bit in range(8 * len(signature)):
        changed = bytearray(signature)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleRefused):
            verify([KEY.public], b"data", bytes(changed))


@given(st.binary(max_size=300))
def test_nonsense_is_refused_and_never_breaks(data: bytes) -> None:
    for call in (
        lambda: verify([KEY.public], b"data", data),
        lambda: read_public(data.decode(errors="replace")),
        lambda: read_secret(data.decode(errors="replace")),
    ):
        with pytest.raises(BundleRefused):
            call()


def test_keys_are_written_and_read_back() -> None:
    assert read_secret(secret_file(KEY)) == KEY
    assert read_public(public_file(KEY.public)) == read_public(str(KEY.public)) == KEY.public
    assert repr(KEY.seed) not in repr(KEY)


def test_a_stranger_s_signature_and_bad_keys_are_named(tmp_path: Path) -> None:
    stranger = new_key()
    with pytest.raises(BundleRefused, match=f"signed by {stranger.public.name}, and trusted are: {KEY.public.name}"):
        verify([KEY.public], b"data", sign(stranger, b"data", "x"))
    with pytest.raises(BundleRefused, match="cannot be read"):
        public_from("/nowhere/key.pub")
    head, line, *_ = secret_file(KEY).split("\n")
    raw = bytearray(base64.b64decode(line))
    raw[70] ^= 1
    (tmp_path / "k").write_text(f"{head}\n{base64.b64encode(raw).decode()}\n")
    with pytest.raises(BundleRefused, match="damaged"):
        secret_from(tmp_path / "k")
    raw[2:4] = b"Sc"
    (tmp_path / "k").write_text(f"{head}\n{base64.b64encode(raw).decode()}\n")
    with pytest.raises(BundleRefused, match="locked by a password"):
        secret_from(tmp_path / "k")
