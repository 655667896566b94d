"""What models write becomes elements, and never a script."""

import pytest

from steps import LAST_ANSWER, answer_with, ask

ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "<svg onload=window.hacked=1>",
    "[click](javascript:window.hacked=1)",
    "[click](JaVaScRiPt:window.hacked=1)",
    "[click](java\tscript:window.hacked=1)",
    "[click](data:text/html,<script>window.hacked=1</script>)",
    "![picture](javascript:window.hacked=1)",
    "<javascript:window.hacked=1>",
    '[x](https://example.org/"onmouseover="window.hacked=1)',
    "```<img src=x onerror=window.hacked=1>\ncode\n```",
    "| <img src=x onerror=window.hacked=1> |\n|---|\n| <b onclick=window.hacked=1>x</b> |",
    "# <iframe src=javascript:window.hacked=1>",
    "- <a href='javascript:window.hacked=1'>x</a>",
    "`<img src=x onerror=window.hacked=1>`",
    "<style>body { display: none }</style>",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_is_never_markup(page, attack):
    answer_with(page, [{"content": part} for part in (attack[:7], attack[7:], "\n\nend")])
    # A person's own message is no markup either.
    ask(page, attack)
    body = page.locator("#messages")
    assert body.locator("script, img, iframe, svg[onload], style, b").count() == 0
    assert body.locator("a[href^='javascript' i], a[href^='data' i]").count() == 0
    handlers = "[...document.querySelectorAll('#messages *')].flatMap((e) => [...e.attributes]).filter((a) => a.name.startsWith('on')).length"
    assert page.evaluate(handlers) == 0
    for link in body.locator(".markdown a").all():
        link.hover()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("getComputedStyle(document.body).display") == "flex"


DOCUMENT = """# Operators

Some **bold**, *emphasis*, ~~gone~~, `code` and a [link](https://example.org/a_(b)), or https://example.org/x.

- one
- two
  1. nested
  2. more
- [x] done
- [ ] open

| operator | device | bytes |
|:---|:-:|--:|
| `KLinearMarlin` | cuda:0 | 12.3 MiB |
| a \\| b | cpu | 230.0 GiB |

```rust
// The order is written out.
fn forward(x: &Act) -> Result<(), OpError> {
    let ids = gate.forward(x, 42)?; // a very long line that does not fit on a phone, and scrolls in its own box
    println!("{ids:?}");
}
```

> A quote
> of two lines

1. first

2. second, with snake_case_names and 2 * 3 * 4

---

The end."""


def test_markdown_is_drawn_as_what_it_means(page, shot):
    # Pieces of any length, as tokens come.
    answer_with(page, [{"content": DOCUMENT[at : at + 5]} for at in range(0, len(DOCUMENT), 5)])
    ask(page, "Show me everything.")
    markdown = page.locator(f"{LAST_ANSWER} .markdown")
    assert markdown.locator("h3").inner_text() == "Operators"
    assert markdown.locator("strong").inner_text() == "bold"
    assert markdown.locator("em").inner_text() == "emphasis"
    assert markdown.locator("del").inner_text() == "gone"
    links = [link.get_attribute("href") for link in markdown.locator("a").all()]
    assert links == ["https://example.org/a_(b)", "https://example.org/x"]
    assert markdown.locator("ul > li > ol > li").all_inner_texts() == ["nested", "more"]
    assert markdown.locator("input[type=checkbox]").count() == 2
    assert markdown.locator("td").all_inner_texts() == ["KLinearMarlin", "cuda:0", "12.3 MiB", "a | b", "cpu", "230.0 GiB"]
    assert "fn forward(x: &Act)" in markdown.locator("pre").inner_text()
    assert markdown.locator(".code-comment").first.inner_text() == "// The order is written out."
    assert markdown.locator("blockquote").inner_text() == "A quote\nof two lines"
    assert markdown.locator("hr").count() == 1
    assert "snake_case_names and 2 * 3 * 4" in markdown.inner_text()
    shot(page, "markdown")


def test_code_is_copied_as_it_was_written(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    answer_with(page, [{"content": "```py\nif a < b:\n    print('&amp;')\n```"}])
    ask(page, "Code?")
    page.get_by_label("Copy the code").click()
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print('&amp;')"


def test_blocks_that_are_finished_keep_their_elements(page):
    """Selected text stays selected while the answer grows, and the work for a piece is that of the last block."""
    kept = page.evaluate(
        """async () => {
            const { MarkdownView } = await import('./web/markdown.js');
            const view = new MarkdownView();
            view.update('first\\n\\nsecond', false);
            const [first, second] = view.element.children;
            view.update('first\\n\\nsecond **and more**\\n\\n- third', false);
            return [view.element.children[0] === first, view.element.children[1] === second, view.element.children.length];
        }"""
    )
    assert kept == [True, False, 3]


def test_hard_texts_take_no_time(page):
    """Nested and unclosed marks do not make the page hang."""
    slowest = page.evaluate(
        """async () => {
            const { MarkdownView } = await import('./web/markdown.js');
            const texts = ['*a ', '[', '[a](', '`'.repeat(3) + 'a`', '**a ', '>', '- ', '<', '_*', '| a ', '![', '~~', '\\\\', 'https://', '1. '];
            let slowest = 0;
            for (const text of texts) {
                const begun = performance.now();
                new MarkdownView().update(text.repeat(Math.floor(49000 / text.length)), true);
                slowest = Math.max(slowest, performance.now() - begun);
            }
            return slowest;
        }"""
    )
    assert slowest < 2000
