"""Who asks, as the Authorization header says it."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearhub.errors import BadTarget
from nearhub.wire.credentials import Caller, Local, as_basic, caller_of, fingerprint, hashed, is_for_others, read_token
from nearhub.wire.policies import Policy, policy_for
from nearhub.wire.target import Repo, RepoKind, Scope


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("", None),
        ("Bearer hf_x", "hf_x"),
        ("bearer  hf_x ", "hf_x"),
        (basic("user:hf_x"), "hf_x"),
        (basic("hf_x:"), "hf_x"),
        (basic("user:a:b"), "a:b"),
        ("Bearer ", None),
        (basic(":"), None),
    ],
)
def test_a_token_in_any_form_that_clients_send(header: str, token: str | None) -> None:
    assert read_token(header) == token


REFUSED = ["Digest x", "Bearer a b", "Bearer \x01", "Basic ???", "Basic \udcac", "Bearer " + "x" * 5000, "hf_x"]


@pytest.mark.parametrize("header", REFUSED)
def test_what_is_no_credential_is_refused_without_repeating_it(header: str) -> None:
    with pytest.raises(BadTarget) as caught:
        read_token(header)
    assert header.split()[-1] not in caught.value.message


@given(st.text())
def test_no_header_does_worse(header: str) -> None:
    try:
        token = read_token(header)
    except BadTarget:
        return
    assert token is None or token.isascii()


def test_a_token_of_this_mirror_goes_to_nobody_and_any_other_to_the_hub() -> None:
    own = {hashed("nh_carol"): Local("carol", frozenset({"nlp"}))}
    assert caller_of("a", "Bearer nh_carol", own) == Caller("a", None, "carol", frozenset({"nlp", "everyone"}))
    assert caller_of("a", basic("x:hf_y"), own) == Caller("a", "Bearer hf_y")
    assert caller_of("a", "", own).is_anonymous


@pytest.mark.parametrize(
    "header", ["Bearer hf_x", basic("hf_x:secret"), basic("user:hf_x"), basic("nh_x:"), "Digest nh_x", "hf_x"]
)
def test_a_token_of_the_hubs_or_of_a_mirrors_goes_to_no_site(header: str) -> None:
    """Wherever in the header it stands."""
    assert not is_for_others(header, {})


def test_a_token_of_another_host_goes_there() -> None:
    known = {hashed("odd"): Local("carol", frozenset())}
    for header in ("Bearer ghp_x", basic("user:secret"), basic("user:shf_x"), "Digest x", "Negotiate abc"):
        assert is_for_others(header, known)
    assert not is_for_others("Bearer odd", known) and not is_for_others(basic("user:odd"), known)


def test_a_token_stands_in_no_repr_and_a_fingerprint_is_this_mirrors_own() -> None:
    assert "hf_y" not in repr(Caller("a", "Bearer hf_y")) + repr(Policy("p", ("*",), frozenset(), "Bearer hf_y"))
    marks = {fingerprint(secret, token) for secret in (b"a" * 32, b"b" * 32) for token in ("Bearer x", "Bearer y")}
    assert len(marks) == 4


def test_git_hears_it_as_a_password() -> None:
    assert base64.b64decode(as_basic("Bearer hf_y").removeprefix("Basic ")) == b"token:hf_y"


def test_the_first_policy_that_names_repo_and_caller() -> None:
    first = Policy("first", ("org/*", "datasets/other/d"), frozenset({"nlp"}))
    second = Policy("second", ("*",), frozenset({"everyone", "carol"}))
    repo = Repo(RepoKind.MODELS, "Org/M", Scope.RESTRICTED)
    assert policy_for([first, second], repo, {"nlp", "everyone"}) is first
    assert policy_for([first, second], repo, {"everyone"}) is second
    assert policy_for([first], Repo(RepoKind.DATASETS, "org/m"), {"nlp"}) is first
    assert policy_for([first], Repo(RepoKind.DATASETS, "Other/D"), {"nlp"}) is first
    assert policy_for([first], Repo(RepoKind.MODELS, "other/d"), {"nlp"}) is None
    assert policy_for([first], Repo(RepoKind.MODELS, "organisation/m"), {"nlp"}) is None


@given(st.from_regex(r"[!-~]{1,30}", fullmatch=True), st.sampled_from(["hf_", "nh_", ""]), st.booleans())
def test_only_tokens_of_others_go_to_others(rest: str, prefix: str, is_basic: bool) -> None:
    """Neither the Hub's nor this mirror's, in any form that clients send; also one whose form nobody knows."""
    token = prefix + rest
    header = f"Basic {base64.b64encode(f'user:{token}'.encode()).decode()}" if is_basic else f"Bearer {token}"
    assert is_for_others(header, {}) is not token.startswith(("hf_", "nh_"))
    assert not is_for_others(header, {hashed(token): Local("alice", frozenset())})
    assert not is_for_others(f"token hf_{rest}", {}) and is_for_others("Digest x", {})
