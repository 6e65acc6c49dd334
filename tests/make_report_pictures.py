"""Makes the pictures of the report in docs/figures, from a quickstart's folder: `make pictures`.

`python tests/make_report_pictures.py quickstart` wants what `bam-lora quickstart --output quickstart` left there, and
Chromium on PATH. The λ-curves are scored where they are not there yet (a minute).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from browser import DESKTOP, PHONE, chromium

from bam_lora.report import collect, compare, render_html
from bam_lora.report.plots import plot_documents
from bam_lora.shrink import shrink
from bam_lora.store import write_text

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
MOST_BYTES = 300_000


def main(quickstart: Path) -> None:
    """Writes report-phone.png (one run), report-desktop.png (both), plane.svg."""
    runs = [quickstart / "single", quickstart / "bam"]
    for run in runs:
        if not (run / "shrink.json").exists():
            shrink(run, None)
    comparison = compare(runs)
    write_text(FIGURES / "plane.svg", plot_documents(comparison["runs"], comparison)["plane"])
    pages = {
        "report-phone": (render_html([collect(runs[1])], None), PHONE, 2),
        "report-desktop": (render_html(comparison["runs"], comparison), DESKTOP, 1),
    }
    with chromium() as browser:
        for name, (page, size, scale) in pages.items():
            photograph(browser, page, size, scale, FIGURES / f"{name}.png")


def photograph(browser: Any, text: str, size: tuple[int, int], scale: int, file: Path) -> None:
    """The top of a page, as the screen shows it."""
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, device_scale_factor=scale, color_scheme="light")
    with tempfile.TemporaryDirectory() as folder:
        page_file = Path(folder) / "report.html"
        page_file.write_text(text, encoding="utf-8")
        page = context.new_page()
        page.goto(page_file.as_uri())
        page.screenshot(path=file)
    context.close()
    taken = file.stat().st_size
    print(f"{file}: {taken:,} bytes")
    assert taken < MOST_BYTES, f"{file} has more than {MOST_BYTES:,} bytes"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart"))
