"""A browser, and pages in it that fail their test if a script of theirs fails or the page breaks its own policy."""

import os
import pathlib

import pytest
from playwright.sync_api import sync_playwright

from steps import until

WIDE = {"width": 1280, "height": 800}


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens the page in a browser that remembers nothing."""
    contexts, problems = [], []

    def open_page(url=None, viewport=None, expected=(), **options):
        # Waiting for an animation says nothing about the page.
        options = {"reduced_motion": "reduce", "color_scheme": "light", **options}
        context = browser.new_context(viewport=viewport or WIDE, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def on_console(message):
            if message.type == "error" and not any(part in message.text for part in expected):
                problems.append(message.text)

        page.on("console", on_console)
        page.goto(url or os.environ["PAGE_URL"])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(open_page):
    page = open_page()
    until(page, "document.getElementById('model-name').textContent === 'pip'")
    return page


@pytest.fixture
def shot():
    """Keeps a picture of a page."""

    def shot(page, name):
        page.screenshot(path=str(pathlib.Path(os.environ["SHOTS"]) / f"{name}.png"))

    return shot
