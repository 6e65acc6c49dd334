"""Plots as files: whole SVG documents, PNG where it can be drawn, colours that can be read."""

from __future__ import annotations

import re
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from report_runs import write_run
from typer.testing import CliRunner

from bam_lora.cli import app
from bam_lora.errors import UserError
from bam_lora.report import collect, compare, write_plots
from bam_lora.report import standalone as drawing
from bam_lora.report.glyphs import short, width_of
from bam_lora.report.plots import plot_documents, write_plane

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>]]>&"


def test_every_plot_of_the_page_is_a_document_of_its_own(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "bam", others=True, learned=2))
    documents = plot_documents([report])
    assert list(documents) == [
        *("plane", "target", "source", "change-learned", "change-forgotten", "data", "cost", "loss", "step", "cosine"),
        *("learned-2-1", "learned-2-2", "learned-1-1", "learned-1-2"),
    ]
    for document in documents.values():
        root = ElementTree.fromstring(document)
        assert root.tag == f"{SVG}svg"
        assert root.findtext(f"{SVG}title")
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert texts[0] == root.findtext(f"{SVG}title")
        assert len(texts) > 3
        # No variables, which few programs but browsers know, and nothing from outside.
        assert not re.search(r"var\(|url\(|@import|href|<script", document)
        assert float(root.get("width", "")) > 500


def test_marks_and_legend_are_in_the_file(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "a", strategy="single", branches=1), write_run(tmp_path / "b")])
    plane = ElementTree.fromstring(plot_documents(comparison["runs"], comparison)["plane"])
    texts = [text.text for text in plane.iter(f"{SVG}text")]
    assert texts[:3] == ["Learned against forgotten", "a", "b"]
    summary = comparison["runs"][1]["summary"]
    places = {(float(g.get("data-x", "")), float(g.get("data-y", ""))) for g in plane.iter(f"{SVG}g")}
    assert (summary["learned"], summary["forgotten"]) in places


def test_plots_of_one_run_among_several_have_its_name(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a b", "a+b", "щ")]
    comparison = compare(folders)
    names = [name for name in plot_documents(comparison["runs"], comparison) if name.startswith("loss")]
    assert names == ["loss-a-b", "loss-a-b-2", "loss-щ"]


def test_names_are_escaped_and_short(tmp_path: Path) -> None:
    report = {**collect(write_run(tmp_path / "bam")), "name": EVIL * 9}
    other = {**report, "name": "漢" * 40}
    for document in plot_documents([report, other]).values():
        ElementTree.fromstring(document)
        assert "<script" not in document
    assert short("漢" * 40) == "漢" * 8 + "…"
    assert width_of("e\N{COMBINING ACUTE ACCENT}") == width_of("e")


def test_files_are_written_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="needs resvg-py (extra plots)")
    report = collect(write_run(tmp_path / "bam", done=0))  # of which there is little to draw
    report["cost"]["seconds_by_stage"] = dict.fromkeys(report["cost"]["seconds_by_stage"])
    said = write_plots(tmp_path / "plots", [report])
    assert said == f"{tmp_path / 'plots'}: 3 plots as SVG and PNG"
    files = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    names = ("target", "source", "data")
    assert files.keys() == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name, content in files.items():
        if name.endswith("png"):
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            assert int.from_bytes(content[16:20], "big") > 1000
    assert drawing.png(files["data.svg"].decode()) == files["data.png"]


def test_without_resvg_svg_is_written_and_it_is_said_how_to_get_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    run = write_run(tmp_path / "bam")
    result = CliRunner().invoke(app, ["report", str(run), "--plots", str(tmp_path / "plots")])
    assert result.exit_code == 0
    assert result.output.endswith(
        "10 plots as SVG\nPNG needs resvg-py. Install it with: pip install 'bam-lora[plots]'\n"
    )
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".svg"}


def test_without_fonts_no_png_is_drawn_with_its_text_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=lambda svg_string, **_: b"blank"))
    drawing._has_fonts.cache_clear()
    report = collect(write_run(tmp_path / "bam"))
    assert write_plots(tmp_path / "plots", [report]).endswith(
        "10 plots as SVG\nPNG needs a font of a usual name, and none is here. Install DejaVu Sans"
    )
    assert write_plane(tmp_path / "model", report) == "figures/plane.svg"
    assert {path.suffix for path in tmp_path.glob("*/*.*") if path.parent.name in ("plots", "figures")} == {".svg"}
    drawing._has_fonts.cache_clear()


def test_plots_do_not_go_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("mine")
    with pytest.raises(UserError, match="expected a folder, found a file"):
        write_plots(tmp_path / "plots", [collect(write_run(tmp_path / "bam"))])


def colours(scheme: str) -> dict[str, float]:
    """{name: relative luminance (WCAG 2)} of a scheme's palette."""
    text = (resources.files("bam_lora.report") / "templates/palette.css").read_text(encoding="utf-8")
    part = text.partition("@media")[0 if scheme == "light" else 2]
    found = dict(re.findall(r"--(\w+): #(\w{6});", part))
    return {name: luminance([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]) for name, code in found.items()}


def luminance(rgb: list[float]) -> float:
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_stand_out_from_the_page(scheme: str) -> None:
    palette = colours(scheme)

    def contrast(name: str, ground: str) -> float:
        low, high = sorted((palette[name], palette[ground]))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", *(f"c{i}" for i in range(8))):  # text, for which WCAG AA wants 4.5
        assert contrast(name, "page") >= 4.5
    assert min(contrast(name, "panel") for name in ("ink", "soft")) >= 4.5
    shades = [contrast(f"r{i}", "page") for i in range(8)]
    assert min(shades) >= 3  # graphics
    # In an order that shows without colour, too.
    assert all(a < b for a, b in pairwise(shades))
