"""Which Python a peer's job is run with; installs the peer on the first call, so that it can be given a time limit.

python benchmarks/gpu/peer_python.py SETTINGS.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job import job

PEERS = Path(__file__).resolve().parent / "peers"
OWN_ENVIRONMENTS = ("unsloth", "axolotl")


def is_ready(way: str, work: Path) -> bool:
    """Whether nothing has to be installed for it."""
    return way not in OWN_ENVIRONMENTS or (work / "envs" / way / ".ready").exists()


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"python": its path, or None, "reason": why there is none}."""
    sys.path.insert(0, str(PEERS))
    from environments import python_for

    wheels = settings["wheels"] and Path(settings["wheels"])
    found = python_for(settings["way"], Path(settings["work"]), wheels)
    if isinstance(found, Path):
        return {"python": str(found), "reason": None}
    return {"python": None, "reason": found}


if __name__ == "__main__":
    job(main)
