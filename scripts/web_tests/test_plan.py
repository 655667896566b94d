"""The plan: the treemap and its table, by pointer and by keyboard, and the experts that are hot."""

import pytest

from steps import begin_long_answer


@pytest.fixture
def plan(page):
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    return page


def test_the_plan_shows_devices_and_what_is_where(plan, shot):
    assert "MiB of weights" in plan.inner_text(".plan-summary")
    device = plan.inner_text(".device")
    assert "cpu" in device and "weights" in device and "that were free" in device
    labels = [cell.get_attribute("aria-label") for cell in plan.locator(".treemap button").all()]
    assert any(label.startswith("layer 1, ") and "% of the model, cpu, opens" in label for label in labels), labels
    shot(plan, "plan")


def test_areas_are_bytes(plan):
    """The largest module has the largest area, and all areas together fill the map."""
    boxes = plan.evaluate(
        """() => [...document.querySelectorAll('.treemap > button')].map((cell) => cell.offsetWidth * cell.offsetHeight)"""
    )
    whole = plan.evaluate("(() => { const e = document.querySelector('.treemap'); return e.clientWidth * e.clientHeight; })()")
    assert 0.95 < sum(boxes) / whole <= 1.0


def test_a_layer_opens_and_its_experts_name_their_rule(plan, shot):
    plan.get_by_label("layer 2, ").click()
    assert plan.inner_text(".trail [aria-current]") == "layer 2"
    plan.get_by_label("mlp, ").click()
    plan.get_by_label("experts, ").first.click()
    details = plan.inner_text(".details")
    for text in ("model.layers.2.mlp.experts", "KTransformersExperts", "cpu", "preset deepseek2", "line ", "Q4_K"):
        assert text in details, details
    shot(plan, "plan-experts")
    plan.get_by_role("button", name="Model", exact=True).click()
    assert plan.locator(".trail li").count() == 1


def test_the_map_goes_by_the_keyboard(plan):
    plan.locator(".treemap button[tabindex='0']").focus()
    label = "document.activeElement.getAttribute('aria-label')"
    first = plan.evaluate(label)
    plan.keyboard.press("ArrowRight")
    second = plan.evaluate(label)
    assert second != first and second.startswith("layer")
    plan.keyboard.press("Enter")
    assert plan.inner_text(".trail [aria-current]") == second.split(",")[0]
    assert plan.evaluate("document.activeElement.classList.contains('cell-button')")
    plan.keyboard.press("Backspace")
    assert plan.evaluate(label) == second
    assert plan.locator(".treemap button[tabindex='0']").count() == 1


def test_the_table_has_the_same_and_can_be_searched_and_sorted(plan, shot):
    plan.locator(".switch").get_by_text("Table").click()
    rows = plan.locator(".plan-table tbody tr")
    assert rows.count() > 50
    plan.fill("#plan-filter", "experts KTransformersExperts")
    assert rows.count() == 4
    assert "line " in rows.first.inner_text()
    plan.fill("#plan-filter", "")
    plan.get_by_role("button", name="Bytes").click()
    assert plan.locator("th[aria-sort=descending]").inner_text().startswith("Bytes")
    assert rows.first.locator("th").inner_text() == "(root)"
    shot(plan, "plan-table")
    plan.fill("#plan-filter", "layers.2.mlp.gate")
    plan.get_by_role("button", name="model.layers.2.mlp.gate", exact=True).click()
    assert plan.is_visible(".treemap")
    assert "model.layers.2.mlp.gate" in plan.inner_text(".details")


def test_colours_can_mean_something_else(plan, shot):
    assert plan.locator(".legend li").all_inner_texts() == ["cpu"]
    plan.select_option("#plan-colour", "type")
    assert {"Q8_0", "Q4_K"} <= set(plan.locator(".legend li").all_inner_texts())
    shot(plan, "plan-types")


def test_the_experts_map_follows_an_answer(page, shot):
    begin_long_answer(page)
    page.click("#nav-plan")
    page.get_by_text("The model generates; the map follows.").wait_for()
    page.locator(".experts-map").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    said = page.inner_text("#experts-said")
    assert said.startswith("Layer 2, expert 1: ") and "of the choices" in said
    page.locator(".experts-map").scroll_into_view_if_needed()
    shot(page, "experts")
    page.get_by_text("The same as a table").click()
    row = page.locator(".experts-table tbody tr").first.inner_text()
    assert "%" in row and "16" in row
    # The answer goes on beside it.
    page.click("#nav-chat")
    assert page.locator(".message.assistant").count() == 1
    page.keyboard.press("Escape")


def test_nothing_is_asked_while_nobody_looks(page):
    page.click("#nav-plan")
    page.wait_for_selector(".treemap button")
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "experts" in request.url else None)
    page.wait_for_timeout(2500)
    assert asked
    page.click("#nav-chat")
    page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
