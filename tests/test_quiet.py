"""What the libraries say before our own line is not shown; what we do not say ourselves is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from versions import before

READ = """
import logging, sys, tempfile
from pathlib import Path
from bam_lora.errors import UserError
from bam_lora.quiet import quiet
from bam_lora.sources import TextSource, open_source, read_texts
quiet()
for name in sys.argv[1:]:
    source = TextSource(name)
    try:
        list(read_texts(source, open_source(source, streaming=True, cache=Path(tempfile.mkdtemp()))))
    except UserError as error:
        print(error)
logging.getLogger("datasets.packaged_modules.json.json").error("something else")
"""


def test_a_failing_read_is_our_line_alone(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "gut"}\n{"text": broken\n')
    (tmp_path / "bad.parquet").write_text("no parquet")
    files = [str(tmp_path / name) for name in ("bad.jsonl", "bad.parquet")]
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    # datasets before 5 looks at the lines with another parser first
    wrong = "ValueError: Expected object or value" if before("datasets", "5") else "ArrowInvalid: JSON parse error"
    assert first.startswith(f"{files[0]}: expected readable data, found {wrong}")
    assert second.startswith(f"{files[1]}: expected readable data, found ArrowInvalid: Parquet magic bytes")
    assert done.stderr == "something else\n"
