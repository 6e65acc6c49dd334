"""What every job of the GPU benchmark shares: `python NAME.py SETTINGS.json`, its last line on stdout is JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def job(work: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
    """Reads the settings that the command line names, does the work, prints what it gives as one line of JSON."""
    if len(sys.argv) != 2:
        sys.exit(f"error: arguments: expected one JSON file of settings, found {len(sys.argv) - 1}")
    result = work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
