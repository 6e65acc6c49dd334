"""What a test needs to know of the libraries' versions: the tests run on the oldest that are allowed, too."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version


def before(package: str, version: str) -> bool:
    """Whether the installed package is older than the version; what skips by it says why."""
    return Version(metadata.version(package)) < Version(version)
