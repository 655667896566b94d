"""The chat: answers, stopping, editing, versions, what stays, settings, keys and errors."""

import json
import os
import re

from steps import LAST_ANSWER, answer_with, ask, begin_long_answer, end_of_answer, refuse_with, requests_of, until


def test_an_answer_comes_as_a_stream_with_its_counts(page, shot):
    shot(page, "chat-empty")
    assert ask(page, "What is 7 + 5?") == "7 + 5 = 12."
    counts = page.inner_text(f"{LAST_ANSWER} .counts")
    assert re.search(r"\d+ prompt tokens.* first after .* s · \d+ tokens · [\d.]+ tokens/s", counts), counts
    assert page.text_content("#chat-title") == "What is 7 + 5?"
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert ask(page, "What is the opposite of hot?") == "The opposite of hot is cold."
    assert page.locator(".message").count() == 4
    shot(page, "chat")


def test_speed_is_shown_while_it_answers_and_stop_keeps_what_came(page, shot):
    begin_long_answer(page)
    until(page, "/tokens\\/s/.test(document.getElementById('statistics').textContent)")
    assert page.is_hidden("#send")
    shot(page, "chat-running")
    page.click("#stop")
    text = end_of_answer(page)
    assert len(text) > 20
    assert page.inner_text(f"{LAST_ANSWER} .ending") == "Stopped."
    assert page.inner_text("#statistics") == ""
    # The server is free again, and the conversation goes on.
    assert ask(page, "What is 7 + 5?")


def test_an_edited_message_is_a_second_version_and_the_first_stays(page, shot):
    ask(page, "What is 7 + 5?")
    page.click("[data-action=edit]")
    field = page.get_by_label("Edited message")
    assert field.input_value() == "What is 7 + 5?"
    shot(page, "chat-edit")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.action") == "edit"
    page.click("[data-action=edit]")
    field.fill("What is the opposite of hot?")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.message.user .message-text')?.textContent.includes('hot')")
    assert end_of_answer(page) == "The opposite of hot is cold."
    assert page.locator(".message").count() == 2
    assert "2 / 2" in page.inner_text(".message.user .version")
    page.click(".message.user [data-action=left]")
    assert page.inner_text(f"{LAST_ANSWER} .markdown") == "7 + 5 = 12."
    assert page.evaluate("document.activeElement.dataset.action") == "right"
    page.keyboard.press("Enter")
    assert "cold" in page.inner_text(f"{LAST_ANSWER} .markdown")


def test_another_answer_is_asked_for_with_the_same_messages(page):
    bodies = requests_of(page)
    ask(page, "What is 7 + 5?")
    page.click(f"{LAST_ANSWER} [data-action=retry]")
    page.wait_for_selector(f"{LAST_ANSWER} .version")
    assert end_of_answer(page) == "7 + 5 = 12."
    assert "2 / 2" in page.inner_text(f"{LAST_ANSWER} .version")
    assert bodies[0]["messages"] == bodies[1]["messages"] == [{"role": "user", "content": "What is 7 + 5?"}]


def test_conversations_stay_after_a_reload_and_can_be_left_and_deleted(page, shot):
    ask(page, "What is 7 + 5?")
    page.click("#new-conversation")
    assert page.locator(".message").count() == 0
    ask(page, "What is the opposite of hot?")
    page.reload()
    assert page.inner_text(f"{LAST_ANSWER} .markdown") == "The opposite of hot is cold."
    titles = page.locator(".conversation")
    assert titles.all_inner_texts() == ["What is the opposite of hot?", "What is 7 + 5?"]
    titles.nth(1).click()
    assert page.inner_text(f"{LAST_ANSWER} .markdown") == "7 + 5 = 12."
    page.get_by_label("Delete “What is 7 + 5?”").click()
    shot(page, "chat-delete")
    page.click("#confirm-yes")
    until(page, "document.querySelectorAll('.conversation').length === 1")
    assert page.locator(".message").count() == 0


def test_what_was_answered_before_a_reload_in_the_middle_is_kept(page):
    begin_long_answer(page)
    page.reload()
    assert page.inner_text(f"{LAST_ANSWER} .ending") == "Stopped."
    assert len(page.inner_text(f"{LAST_ANSWER} .markdown")) > 20


def test_conversations_can_be_taken_away_and_brought_back(page, tmp_path):
    ask(page, "What is 7 + 5?")
    with page.expect_download() as download:
        page.click("#export-all")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    assert json.loads(file.read_text())["format"] == "ktx-conversations-1"
    page.click("#delete-all")
    page.click("#confirm-yes")
    page.wait_for_selector(".conversation", state="detached")
    page.set_input_files("#import-file", file)
    page.click(".conversation")
    assert page.inner_text(f"{LAST_ANSWER} .markdown") == "7 + 5 = 12."
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"format": "ktx-conversations-1", "conversations": [{"id": "../x", "nodes": {}}, 3, null]}')
    page.set_input_files("#import-file", wrong)
    assert page.locator(".conversation").count() == 1


def test_settings_are_sent_and_empty_ones_are_not(page, shot):
    bodies = requests_of(page)
    ask(page, "What is 7 + 5?")
    assert set(bodies[-1]) == {"model", "messages", "stream", "stream_options"}
    page.click("#open-settings")
    shot(page, "settings")
    page.fill("#system", "You are terse.")
    page.get_by_label("Temperature").fill("0.3")
    page.get_by_label("Tokens at most").fill("4")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Top p").fill("3")
    page.get_by_label("Answer at once").check()
    # A value out of range holds the dialog open, and is not sent.
    page.get_by_role("button", name="Done").click()
    assert page.is_visible("#settings")
    page.get_by_label("Top p").fill("")
    page.get_by_role("button", name="Done").click()
    page.reload()
    ask(page, "Tell me a long story.")
    body = bodies[-1]
    assert body["messages"][0] == {"role": "system", "content": "You are terse."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0.3, 4, 7)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_p" not in body
    assert page.inner_text(f"{LAST_ANSWER} .ending") == "The answer reached its length."


def test_thoughts_are_folded_and_can_be_opened(page, shot):
    answer_with(page, [{"reasoning_content": "Seven and "}, {"reasoning_content": "five."}, {"content": "**12**"}])
    assert ask(page, "What is 7 + 5?") == "12"
    assert page.is_hidden(".thought-text")
    page.click(".thoughts summary")
    assert page.inner_text(".thought-text") == "Seven and five."
    shot(page, "chat-thoughts")


def test_thoughts_and_failed_answers_are_not_sent_back(open_page):
    page = open_page(expected=["500"])
    bodies = requests_of(page)
    refuse_with(page, 500, "the engine failed")
    page.fill("#prompt", "One?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".problem")
    answer_with(page, [{"reasoning_content": "Hm."}, {"content": "Two."}])
    ask(page, "Two?")
    answer_with(page, [{"content": "Three."}])
    ask(page, "Three?")
    assert [m["content"] for m in bodies[-1]["messages"]] == ["One?", "Two?", "Two.", "Three?"]


def test_a_full_queue_says_when_to_come_back(open_page, shot):
    page = open_page(expected=["429"])
    refuse_with(page, 429, "the queue is full", {"retry-after": "7"})
    page.fill("#prompt", "What is 7 + 5?")
    page.keyboard.press("Enter")
    assert "Too many requests wait" in page.inner_text(".problem")
    assert "Try again in 7 s" in page.inner_text(".problem")
    shot(page, "chat-problem")
    page.unroute("**/v1/chat/completions")
    page.click("[data-action=again]")
    page.wait_for_selector(".version")
    assert end_of_answer(page) == "7 + 5 = 12."


def test_a_server_that_is_gone_is_named_and_the_message_stays(open_page):
    page = open_page(expected=["ERR_FAILED"])
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#prompt", "What is 7 + 5?")
    page.keyboard.press("Enter")
    assert "ktx serve" in page.inner_text(".problem")
    assert page.inner_text(".message-text") == "What is 7 + 5?"


def test_what_the_server_refuses_is_said_in_its_words(open_page):
    page = open_page(expected=["400"])
    page.evaluate("localStorage.setItem('ktx.settings', JSON.stringify({ max_tokens: 1 }))")
    page.reload()
    page.fill("#prompt", "word " * 4000)
    page.keyboard.press("Enter")
    assert "The server refused the request" in page.inner_text(".problem")


def test_a_key_is_asked_for_and_a_wrong_one_is_asked_for_again(open_page, shot):
    page = open_page(os.environ["LOCKED_URL"], expected=["401"])
    page.wait_for_selector("#key-dialog[open]")
    shot(page, "key")
    page.fill("#key", "sk-wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", os.environ["PAGE_KEY"])
    page.keyboard.press("Enter")
    until(page, "document.getElementById('model-name').textContent === 'pip'")
    assert ask(page, "What is 7 + 5?") == "7 + 5 = 12."
    # Not kept unless that was asked for.
    assert page.evaluate("Object.values(localStorage).some((value) => value.includes('sk-page'))") is False
    page.reload()
    assert ask(page, "What is the opposite of hot?") == "The opposite of hot is cold."
    page.goto(os.environ["LOCKED_URL"] + "#plan")
    page.wait_for_selector(".treemap button")
    page.click("#open-settings")
    page.click("#change-key")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('key-state').textContent === 'No key is set.'")


def test_a_dialog_that_is_cancelled_says_how_to_go_on(open_page):
    page = open_page(os.environ["LOCKED_URL"], expected=["401"])
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.press("Escape")
    until(page, "document.getElementById('notice').textContent.includes('API key')")
