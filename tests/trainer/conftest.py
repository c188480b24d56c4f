"""Fixtures: tiny bases made on the spot, and a mirror of a stand-in Hub, both as processes."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import HubProcess
from tests.mirror import MirrorProcess
from tests.trainer.bases import make_llama, make_opt


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A run goes offline for good; other tests' clients must not."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of 30,000 parameters that has learnt nothing."""
    return make_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source's architecture, pre-trained for some seconds on local text; no chat template."""
    return make_opt(tmp_path_factory.mktemp("bases") / "opt")


@pytest.fixture(scope="session")
def hub() -> Iterator[HubProcess]:
    with HubProcess() as process:
        yield process


@pytest.fixture(scope="session")
def mirror(hub: HubProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MirrorProcess]:
    with MirrorProcess(tmp_path_factory.mktemp("mirror") / "cache", [hub.url], [hub.cdn_host]) as process:
        yield process


@pytest.fixture(scope="module", autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """What fixtures of a module do in this process goes offline too."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run in this process goes offline and listens to signals; the next test begins without."""
    import huggingface_hub.constants
    import torch

    torch.set_num_threads(1)
    for name in ("HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
