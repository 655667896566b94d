"""What a person does on the page, in few words."""

import json
import time

LAST_ANSWER = ".message.assistant:last-child"


def until(page, condition, argument=None, seconds=30):
    """Waits for a condition. Playwright's own way needs `eval`, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(30)


def ask(page, text):
    """Sends a message and waits for the end of the answer; its text."""
    before = page.locator(".message.assistant").count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    until(page, "count => document.querySelectorAll('.message.assistant').length > count", before)
    return end_of_answer(page)


def end_of_answer(page):
    page.wait_for_selector(f"{LAST_ANSWER} [data-action=retry]")
    return page.inner_text(f"{LAST_ANSWER} .markdown").strip()


def begin_long_answer(page):
    """Begins an answer that takes seconds, and waits for its first words."""

    def lengthen(route):
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True, "max_tokens": 900})

    page.route("**/v1/chat/completions", lengthen, times=1)
    page.fill("#prompt", "Tell me a long story.")
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('{LAST_ANSWER} .markdown')?.textContent.length > 20")


def answer_with(page, pieces, usage=None, status=200, headers=None):
    """Lets the server answer with these deltas of a stream."""
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if usage:
        events.append({"choices": [], "usage": usage})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    fulfil(page, body, status, {"content-type": "text/event-stream", **(headers or {})})


def refuse_with(page, status, message, headers=None):
    """Lets the server refuse the next requests."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
    fulfil(page, body, status, {"content-type": "application/json", **(headers or {})})


def fulfil(page, body, status, headers):
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body, headers=headers))


def requests_of(page):
    """A list that grows by the bodies of all chat requests from now on."""
    bodies = []

    def keep(request):
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(request.post_data_json)

    page.on("request", keep)
    return bodies


def fits(page):
    """Whether nothing sticks out to the side."""
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
