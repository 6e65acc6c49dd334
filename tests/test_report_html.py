"""The page, the plots, the terminal table and the model card: everything said is right, and nothing is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import write_run

from bam_lora.report import collect, compare, render_html, render_text
from bam_lora.report import format as fmt
from bam_lora.report.svg import Axes, Point, Series, plot
from bam_lora.report.ticks import tick_texts, ticks

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>&amp;\x1b[31m{{ 7 * 7 }}"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests ask for, and checks that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.fixture
def comparison(tmp_path: Path) -> dict[str, Any]:
    single = write_run(tmp_path / "single", strategy="single", iterations=1, branches=1)
    return compare([single, write_run(tmp_path / "bam", others=True, learned=2)])


def test_every_number_in_the_page_is_one_of_the_json(comparison: dict[str, Any]) -> None:
    known = set(numbers(json.loads(json.dumps(comparison))))
    page = Page(render_html(comparison["runs"], comparison))
    shown = [float(attributes["value"] or "") for tag, attributes in page.elements if tag == "data"]
    assert len(shown) > 80
    assert set(shown) <= known
    for report in comparison["runs"]:
        assert {report["summary"][key] for key in ("learned", "forgotten", "target_before", "delta_norm")} <= set(shown)
        assert {score["bits_per_byte"] for score in report["scores"]} <= set(shown)


def test_rounded_text_agrees_with_its_exact_value(comparison: dict[str, Any]) -> None:
    text = render_html(comparison["runs"], comparison)
    pairs = re.findall(r'<data value="([-\d.e]+)">([+−]?\d\.\d{4})(?: ±|<)', text)
    assert len(pairs) > 30
    for value, rounded in pairs:
        assert float(rounded.replace("−", "-")) == pytest.approx(float(value), abs=5.1e-5)


def test_text_from_files_is_shown_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a <b>bold</b> run".replace("/", "|"), sample=EVIL, source=EVIL, base=EVIL)
    report = collect(run)
    report["environment"]["command"] = EVIL
    report["scores"][0]["set"] = EVIL
    text = render_html([report], None)
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "iframe", "object"}
    assert [attributes for tag, attributes in page.elements if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    shown = "".join(page.texts)
    assert shown.count("<script>alert('x')</script>") >= 4
    assert "{{ 7 * 7 }}" in shown
    assert "a <b>bold<|b> run" in shown


def test_the_page_needs_nothing_from_outside(comparison: dict[str, Any]) -> None:
    text = render_html(comparison["runs"], comparison)
    page = Page(text)
    assert not [a for _, a in page.elements if {"src", "srcset", "data", "xlink:href"} & a.keys()]
    links = [str(a["href"]) for _, a in page.elements if "href" in a]
    assert links[0] == "data:,"  # no icon, or a browser would ask for one
    idents = {f"#{a['id']}" for _, a in page.elements if "id" in a}
    assert set(links[1:]) <= idents
    assert len(links) > 8
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_ids_are_unique_and_every_plot_has_a_title_and_a_description(comparison: dict[str, Any]) -> None:
    page = Page(render_html(comparison["runs"], comparison))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    plots = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(plots) == 14
    for attributes in plots:
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    assert "bam: 2.4614 at 0 tokens, 1.7994 at 250,000 tokens" in "".join(page.texts)


def test_tables_scroll_and_can_be_reached_by_keyboard(comparison: dict[str, Any]) -> None:
    page = Page(render_html(comparison["runs"], comparison))
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert len(regions) == sum(tag == "table" for tag, _ in page.elements)
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)


def test_the_verdict_is_in_the_page_and_on_the_terminal(comparison: dict[str, Any]) -> None:
    words = "Learning and forgetting trade off here: neither run dominates."
    assert words in render_html(comparison["runs"], comparison)
    assert words in " ".join(render_text(comparison["runs"], comparison).split())


@pytest.mark.parametrize("done", [0, 1])
def test_an_unfinished_run_has_a_page(tmp_path: Path, done: int) -> None:
    report = collect(write_run(tmp_path / "run", done=done))
    text = render_html([report], None)
    Page(text)
    assert f"Unfinished: {done} of 2 iterations merged." in text
    assert "Not compared: nothing here says" in text


def test_samples_before_and_after(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "run"))
    report["samples"].append({"iteration": 1, "prompt": "Der Befehl", "text": "a text between"})
    text = render_html([report], None)
    assert "the command die of the file is" in text
    assert "Der Befehl schreibt die Datei" not in text.split('class="texts"')[1].split("</article>")[0]
    assert "a text between" not in text


def boxes(svg: str) -> list[tuple[float, float, float, float, str]]:
    """The boxes of a plot's texts, at the width a usual font takes."""
    result = []
    for element in ElementTree.fromstring(svg).iter("text"):
        x, y, width = float(element.get("x", 0)), float(element.get("y", 0)), 6.0 * len(element.text or "")
        x -= {"start": 0.0, "middle": width / 2, "end": width}[element.get("text-anchor", "start")]
        result.append((x, y - 9, x + width, y, element.text or ""))
    return result


def overlapping(svg: str) -> list[tuple[str, str]]:
    found = boxes(svg)
    return [
        (a[4], b[4])
        for i, a in enumerate(found)
        for b in found[i + 1 :]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


TOKENS = st.integers(0, 10**10)
BITS_PER_BYTE = st.floats(-9, 9).map(lambda x: round(x, 4))


@settings(max_examples=25)
@given(st.lists(st.tuples(TOKENS, BITS_PER_BYTE), min_size=1, max_size=12), st.booleans())
def test_labels_of_a_plot_do_not_overlap_and_stay_inside(places: list[tuple[int, float]], zero: bool) -> None:
    points = [Point(x, y, "text", label=str(i), error=0.1) for i, (x, y) in enumerate(places)]
    axes = Axes("forgotten", "learned (bits per byte)", x_format=fmt.short_count, zero=zero, corner="better")
    svg = str(plot([Series("run", 0, points)], axes, ident="p", title="t", description="d"))
    assert overlapping(svg) == []
    assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 400 and box[3] <= 290 for box in boxes(svg))


def test_crowded_labels_are_left_out_rather_than_drawn_over_each_other() -> None:
    points = [Point(0.5, 0.5, "text", label=f"iteration {i}") for i in range(20)]
    svg = str(plot([Series("run", 0, points)], Axes("x", "y"), ident="p", title="t", description="d"))
    assert 0 < svg.count('class="label') < 20
    assert overlapping(svg) == []


def test_texts_of_a_plot_are_escaped() -> None:
    series = Series("run", 0, [Point(0, 0, EVIL, label="<b>")])
    svg = str(plot([series], Axes("<i>", "&"), ident="p", title=EVIL, description=EVIL))
    assert "<script" not in svg
    assert "<b>" not in svg
    assert "<i>" not in svg


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_lie_in_the_range_and_tell_themselves_apart(low: float, width: float, most: int) -> None:
    high = low + width
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    values = ticks(low, high, most)
    assert len(values) <= most
    assert all(low - 1e-6 * width <= value <= high + 1e-6 * width for value in values)
    assert values == sorted(values)


def test_tick_texts_have_the_decimals_their_step_needs() -> None:
    assert tick_texts([0.0, 0.025, 0.05]) == ["0.000", "0.025", "0.050"]
    assert tick_texts([-2.0, 0.0, 2.0]) == ["−2", "0", "2"]
    assert tick_texts([]) == []


def test_terminal_table_is_aligned_and_free_of_control_characters(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path / "日本\x1b[31m語"))
    text = render_text([report], None)
    assert "\x1b" not in text
    assert "Learned                     1.0034 ± 0.0093" in text
    assert all(len(line) <= 88 for line in text.splitlines())


def test_numbers_for_people() -> None:
    assert [fmt.duration(s) for s in (None, 3.21, 59.97, 245, 7620)] == [
        "–",
        "3.2 s",
        "1 min 00 s",
        "4 min 05 s",
        "2 h 07 min",
    ]
    assert [fmt.size(b) for b in (None, 12, 1020 * 1024, 1.5 * 2**30)] == ["–", "12 B", "1,020 KiB", "1.5 GiB"]
    assert [fmt.signed(v) for v in (0.5, -0.5, -0.00001, None)] == ["+0.5000", "−0.5000", "0.0000", "–"]
    assert fmt.signless(-0.00001) == "0.0000"
    assert [fmt.percent(v) for v in (0.0003, 0.0312, None)] == ["0.03 %", "3.12 %", "–"]
    assert [fmt.short_count(v) for v in (0, 999, 1500, 2.5e8)] == ["0", "999", "1.5k", "250M"]


# Of report.json, what the page says in another place or need not say: identities, settings, what follows from others.
SILENT = {
    "format", "cost.sessions", "status.measured_iteration",  # of a run that is not finished
    "iterations.branches.measured.learned", "iterations.branches.measured.forgotten",  # of two scores that are shown
    "iterations.branches.tokens", "seeds.branches",  # as in the plan of the branches
    "iterations.cosine_by_layer.tensors", "iterations.norm_by_layer.tensors",
}  # fmt: skip


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where the numbers of a JSON value stand."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def changed(value: Any, path: tuple[str | int, ...]) -> Any:
    """The same value with another number in one place."""
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = changed(copy[key], tuple(rest)) if rest else copy[key] * 1.25 + 1
    return copy


def test_a_number_that_changes_in_the_json_changes_on_the_page(tmp_path: Path) -> None:
    report = json.loads(json.dumps(collect(write_run(tmp_path / "bam", others=True))))
    kinds: dict[str, tuple[str | int, ...]] = {}
    for path in leaves(report):
        kinds[".".join(str(key) for key in path if isinstance(key, str))] = path
    before = render_html([report], None)
    same = {kind for kind, path in kinds.items() if render_html([changed(report, path)], None) == before}
    assert len(kinds) > 100
    assert same == SILENT
