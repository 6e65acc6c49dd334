"""A real browser for the tests: whichever Chromium is on PATH, watched for errors, requests and dialogs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESKTOP, PAPER = (390, 844), (1280, 900), (718, 1000)  # the last: A4 less its margins, in CSS pixels


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test, saying so, where there is none."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser on PATH: one of {', '.join(NAMES)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra dev)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page with everything that it should not do."""

    def __init__(self, browser: Any, file: Path, size: tuple[int, int], scheme: str, media: str | None = None) -> None:
        self.file = file
        self.complaints: list[str] = []
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dismiss)
        self.page.on("request", self._requested)
        if media:
            self.page.emulate_media(media=media, color_scheme=scheme)
        self.page.goto(file.as_uri())

    def _dismiss(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _requested(self, request: Any) -> None:
        if request.url.partition("#")[0] != self.file.as_uri() and request.url != "data:,":
            self.complaints.append(f"request: {request.url}")

    def ask(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.page.evaluate(script)

    def close(self) -> None:
        """Ends the page and its context."""
        self.context.close()


# Every element that a reader sees and that is not in a box of its own that scrolls: how far it leaves the window.
OUTSIDE = """() => [...document.body.querySelectorAll('*')]
    .filter(one => !one.closest('svg svg') && !one.parentElement.closest('.scroll, pre') && one.getClientRects().length)
    .filter(one => !one.closest('svg') || one.tagName === 'svg')
    .map(one => [one, one.getBoundingClientRect()])
    .filter(([one, box]) => box.left < -1 || box.right > innerWidth + 1)
    .map(([one, box]) => `${one.tagName} ${one.className} ${box.left} ${box.right}`)"""

# Texts of pictures that leave their picture, and the marks that do.
CLIPPED = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text, path, rect')]
        .map(one => [one, one.getBoundingClientRect()])
        .filter(([one, box]) => frame.width && (box.left < frame.left - 1.5 || box.right > frame.right + 1.5 ||
            box.top < frame.top - 1.5 || box.bottom > frame.bottom + 1.5))
        .map(([one, box]) => `${svg.getAttribute('aria-labelledby')} ${one.tagName} ${one.textContent}`)})"""

# Texts of pictures that lie over each other.
OVERLAPPING = """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].map(one => [one, one.getBoundingClientRect()])
        .filter(([one, box]) => box.width && !one.getAttribute('transform'));
    return texts.flatMap(([a, p], i) => texts.slice(i + 1)
        .filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1)
        .filter(([b, q]) => p.top < q.bottom - 3 && q.top < p.bottom - 3)
        .map(([b]) => `${svg.getAttribute('aria-labelledby')}: ${a.textContent} / ${b.textContent}`))})"""

# {title of a table: [[[text, exact number or null] for each cell] for each row]}, and the column heads as first row.
TABLES = """() => Object.fromEntries([...document.querySelectorAll('.scroll')].map(box => [
    box.getAttribute('aria-label'), [...box.querySelectorAll('tr')].map(row => [...row.children].map(cell => {
        const data = cell.querySelector('data');
        return [cell.textContent.trim(), data ? Number(data.value) : null]}))]))"""

# {id of a picture: [[what a pointer shows, x, y] for each mark]} and the bars' parts.
MARKS = """() => Object.fromEntries([...document.querySelectorAll('svg.plot')].map(svg =>
    [svg.getAttribute('aria-labelledby').split('-title ')[0], [...svg.querySelectorAll('g')].map(one =>
        [one.querySelector('title').textContent, ...['x', 'y', 'value'].map(key =>
            one.dataset[key] === undefined ? null : Number(one.dataset[key]))])]))"""
