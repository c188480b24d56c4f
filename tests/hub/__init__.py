"""The stand-in Hub: a real server on two ports that answers as the Hugging Face Hub and its CDN do, or fails as told.

Everything that tests need is here; start with `async with Hub() as hub: hub.repo("org/m").commit({...})`.
"""

from tests.hub.content import LFS, Content, File, git_blob_sha1
from tests.hub.faults import Fault, Rule
from tests.hub.ledger import Counters, Exchange, Log
from tests.hub.process import HubProcess, RemoteRepo, RemoteRule
from tests.hub.repos import Commit, Repo
from tests.hub.server import Hub
from tests.hub.world import Limits, User

__all__ = [
    "LFS",
    "Commit",
    "Content",
    "Counters",
    "Exchange",
    "Fault",
    "File",
    "Hub",
    "HubProcess",
    "Limits",
    "Log",
    "RemoteRepo",
    "RemoteRule",
    "Repo",
    "Rule",
    "User",
    "git_blob_sha1",
]
