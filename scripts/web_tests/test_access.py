"""Everybody can use it: small screens, the keyboard alone, dark colours, and what screen readers are told."""

import os

import pytest

from steps import LAST_ANSWER, answer_with, ask, begin_long_answer, fits, until
from test_markdown import DOCUMENT

PHONE = {"width": 360, "height": 740}


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label') || document.activeElement.textContent")


def test_a_phone_shows_everything_without_scrolling_to_the_side(open_page, shot):
    page = open_page(viewport=PHONE, has_touch=True)
    assert fits(page)
    shot(page, "phone-empty")
    answer_with(page, [{"content": DOCUMENT}])
    page.fill("#prompt", "Show me everything.")
    page.click("#send")
    page.wait_for_selector(f"{LAST_ANSWER} [data-action=retry]")
    assert fits(page)
    shot(page, "phone-chat")
    page.click("#open-settings")
    assert fits(page)
    shot(page, "phone-settings")
    page.keyboard.press("Escape")
    page.click("#sidebar-toggle")
    assert focused(page) == "new-conversation"
    shot(page, "phone-conversations")
    page.keyboard.press("Escape")
    assert focused(page) == "sidebar-toggle"
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    assert fits(page)
    shot(page, "phone-plan")
    page.locator(".switch").get_by_text("Table").click()
    assert fits(page)


def test_text_can_be_twice_as_large(open_page):
    page = open_page(viewport={"width": 640, "height": 800})
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    ask(page, "What is 7 + 5?")
    assert fits(page)


def test_everything_goes_by_the_keyboard_alone(page):
    page.keyboard.press("Tab")
    assert focused(page) == "skip"
    page.keyboard.press("Enter")
    assert focused(page) == "prompt"
    page.keyboard.type("What is 7 + 5?")
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{LAST_ANSWER} [data-action=retry]")
    assert focused(page) == "prompt"
    # Back over the answer's and the question's buttons.
    seen = []
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
        seen.append(focused(page))
    assert seen == ["Answer again", "Copy the message", "Edit the message", "Copy the message"]
    begin_long_answer(page)
    page.keyboard.press("Escape")
    page.wait_for_selector(f"{LAST_ANSWER} .ending")
    assert focused(page) == "prompt"
    page.focus("#open-settings")
    page.keyboard.press("Enter")
    page.wait_for_selector("#settings[open]")
    page.keyboard.press("Escape")
    assert focused(page) == "open-settings"
    page.focus("#nav-plan")
    page.keyboard.press("Enter")
    page.wait_for_selector(".treemap button")


def test_screen_readers_hear_blocks_and_not_pieces(page):
    page.evaluate(
        """() => {
            window.said = [];
            new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) => window.said.push(node.textContent))))
                .observe(document.getElementById('announcer'), { childList: true });
        }"""
    )
    answer_with(page, [{"content": piece} for piece in ("One ", "block.", "\n\n", "Another ", "one.")])
    ask(page, "Two blocks?")
    until(page, "window.said.includes('The answer is complete.')")
    assert page.evaluate("window.said") == ["The model answers.", "One block.", "Another one.", "The answer is complete."]
    assert page.get_attribute(LAST_ANSWER, "aria-busy") == "false"


def test_landmarks_and_headings_are_there(page):
    for role, name in [("banner", None), ("navigation", "Views"), ("complementary", "Conversations"), ("main", None)]:
        assert page.get_by_role(role, name=name).count() == 1, (role, name)
    ask(page, "What is 7 + 5?")
    assert page.get_by_role("heading", level=1).text_content() == "What is 7 + 5?"
    assert page.get_by_role("heading", level=2).all_inner_texts()[:2] == ["You", "pip"]


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_colours_follow_the_system_and_the_button(open_page, shot):
    page = open_page(color_scheme="dark")
    dark = background(page)
    answer_with(page, [{"content": DOCUMENT}])
    ask(page, "Show me everything.")
    shot(page, "dark-chat")
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    shot(page, "dark-plan")
    page.click("#theme-toggle")
    light = background(page)
    assert light != dark
    page.reload()
    assert background(page) == light
    page.click("#theme-toggle")
    assert background(page) == dark
    page.emulate_media(color_scheme="light")
    assert background(page) == dark
    page.click("#theme-toggle")
    assert background(page) == light


def test_nothing_moves_for_those_who_do_not_want_it(page):
    begin_long_answer(page)
    moving = "document.getAnimations().filter((a) => a.playState === 'running').length"
    assert page.evaluate(moving) == 0
    page.keyboard.press("Escape")


def test_the_page_loads_nothing_from_elsewhere(open_page):
    asked = []
    page = open_page("about:blank")
    page.on("request", lambda request: asked.append(request.url))
    page.goto(os.environ["PAGE_URL"])
    answer_with(page, [{"content": "![picture](https://example.org/x.png) [link](https://example.org)"}])
    ask(page, "A picture?")
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    assert [url for url in asked if not url.startswith(os.environ["PAGE_URL"])] == []


axe = pytest.mark.skipif(not os.path.exists(os.environ.get("AXE", "")), reason="axe-core cannot be had")


def problems(page):
    """What axe-core finds, in one line each."""
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found for node in one["nodes"]]


@axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [None, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(open_page, scheme, viewport):
    page = open_page(viewport=viewport, color_scheme=scheme, bypass_csp=True)
    page.add_script_tag(path=os.environ["AXE"])
    assert problems(page) == []
    answer_with(page, [{"reasoning_content": "Hm."}, {"content": DOCUMENT}])
    ask(page, "Show me everything.")
    assert problems(page) == []
    page.click("#open-settings")
    assert problems(page) == []
    page.keyboard.press("Escape")
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    page.wait_for_selector(".experts-map")
    assert problems(page) == []
    page.locator(".switch").get_by_text("Table").click()
    assert problems(page) == []
