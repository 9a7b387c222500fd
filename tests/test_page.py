"""The page in a real browser: a person chats with a real model and sees the cache. It needs the extra `browser` and an installed Chromium."""

import os
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from serving_process import ServerProcess, until

playwright = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")

CHROMIUM = os.environ.get("KVLOCAL_TEST_BROWSER") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: install one, or name it in KVLOCAL_TEST_BROWSER")

SCREENSHOTS = os.environ.get("KVLOCAL_SCREENSHOTS")  # a directory that gets those of the documentation
MAX_SCREENSHOT = 150_000  # bytes
OPTIONS = ("--kv-budget", "256", "--stride", "64", "--threads", "1", "--temp", "0", "--archive", "ram", "--archive-ram", "200")
LONG = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. " * 5
SECONDS = 120_000  # milliseconds; a busy machine answers slowly


@pytest.fixture(scope="module")
def server(smollm2):
    with ServerProcess(smollm2, *OPTIONS, "--max-tokens", "60", "--forget", "--parallel", "2") as running:
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def slow(short_smollm2):
    """A model that finds no end: its answers end when somebody stops them."""
    options = "--max-tokens", "100000", "--repeat-penalty", "1.3", "--forget", "--parallel", "1"
    with ServerProcess(short_smollm2, *OPTIONS, *options, environment={"KVLOCAL_API_KEY": "the-key"}) as running:
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        # in a container there is no sandbox for the browser to make
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else [])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser):
    """Opens the page of a server in a browser of its own; on the way out its console has no complaint."""

    @contextmanager
    def opened(server, path="/", *, expected=(), **options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 760}, **options})
        page, complaints = context.new_page(), []
        page.set_default_timeout(SECONDS)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(server.address) else None)
        try:
            page.goto(server.address + path)
            yield page
            assert [text for text in complaints if not any(word in text for word in expected)] == []
        finally:
            context.close()

    return opened


def comes(page, expression):
    """Waits until something is so. What the browser waits for by itself it compiles inside the page, whose policy forbids that."""
    assert until(lambda: page.evaluate(expression), SECONDS / 1000), expression


def say(page, text, *, wait=True):
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    if wait:
        ended(page)


def ended(page):
    page.wait_for_selector("#send:visible")
    comes(page, "!document.querySelector('.comes, .waits')")


def texts(page, role):
    return page.locator(f".message.{role} > .text").all_inner_texts()


def shown(page):
    """The conversation in the address."""
    comes(page, "location.hash.length > 1")
    return page.evaluate("location.hash.slice(1)")


def kept(server, identity, **headers):
    """What the server has of it, without its system prompt."""
    return [each for each in server.get(f"/conversations/{identity}", **headers).json["messages"] if each["role"] != "system"]


def action(page, role, n, name):
    message = page.locator(f".message.{role}").nth(n)
    message.hover()
    message.get_by_role("button", name=name).click()


def fits(page):
    """Whether nothing is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth")


def screenshot(page, name):
    """One for the documentation, if somebody wants them; its size is checked either way."""
    data = page.screenshot(animations="disabled", path=Path(SCREENSHOTS) / name if SCREENSHOTS else None)
    assert len(data) < MAX_SCREENSHOT


# A chat


def test_a_chat_with_its_cache(server, visit):
    with visit(server) as page:
        assert page.evaluate("document.activeElement.id") == "message" and page.locator("#map-body").inner_text() == "Nothing is in it yet."
        say(page, "Tell me in a few sentences about the keepers of lighthouses in the north.", wait=False)
        lengths = set()
        assert until(lambda: lengths.add(len(texts(page, "assistant")[-1])) or len(lengths) > 3, 60)
        ended(page)
        first = shown(page)
        assert page.locator("#conversations a[aria-current=page]").inner_text().startswith("Tell me in a few sentences")
        say(page, "Which birds live there? Answer with a Markdown list.")
        say(page, "Write a short Python function that prints the names of three birds.")
        say(page, "What did I ask you about at first?", wait=False)
        # the map changes while the answer comes
        states = set()
        assert until(lambda: states.add(page.locator(".parts li:last-child button").get_attribute("title")) or len(states) > 2, 60)
        ended(page)
        assert shown(page) == first
        said = kept(server, first)
        assert [each["role"] for each in said] == ["user", "assistant"] * 4
        view = server.get(f"/conversations/{first}/map").json
        assert any(part["cached"] < part["tokens"] - 1 for part in view["parts"]) and view["cache"]["recalled"] > 0
        comes(page, f"document.querySelector('.figure').textContent.includes('{view['cache']['used']} cells')")
        rows = page.locator(".parts li")
        assert rows.count() == len(view["parts"]) and "in the archive" in rows.nth(1).locator("button").get_attribute("title")
        shares = [row.locator(".share").inner_text() for row in rows.all()]
        assert [bool(share) for share in shares] == [part["attention"] is not None for part in view["parts"]]
        # what the row stands for is shown and gets the focus
        rows.nth(1).locator("button").click()
        assert page.evaluate("document.activeElement.dataset.turn + document.activeElement.dataset.role") == "1user"
        page.locator("#scroll").evaluate("element => element.scrollTo(0, element.scrollHeight)")
        screenshot(page, "page-light.png")
        assert not until(lambda: not fits(page), 0.1)
        # another one, and back to the first after the page was loaded again
        page.click("#new")
        say(page, "Hello!")
        assert shown(page) != first and len(texts(page, "user")) == 1
        page.reload()
        page.wait_for_selector(".message.assistant")
        page.locator("#conversations a", has_text="Tell me in a few").click()
        comes(page, "document.querySelectorAll('.message.user').length === 4")
        assert texts(page, "user") == [each["content"] for each in said[::2]] and shown(page) == first
        page.go_back()
        comes(page, "document.querySelectorAll('.message.user').length === 1")


def test_dark_and_narrow(server, visit):
    with visit(server, color_scheme="dark") as page:
        say(page, "Which colours does the sea have?")
        background = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(background)
        assert sum(map(int, dark.removeprefix("rgb(").removesuffix(")").split(","))) < 200
        page.wait_for_selector(".parts li")
        page.click("#theme")
        light = page.evaluate(background)
        assert light != dark
        page.reload()
        assert page.evaluate(background) == light
        page.click("#theme")
        page.locator("#conversations a").last.click()
        page.wait_for_selector(".parts li")
        page.wait_for_timeout(300)
        screenshot(page, "page-dark.png")
    with visit(server, color_scheme="light", viewport={"width": 360, "height": 720}) as page:
        assert fits(page) and not page.is_visible("#map") and not page.is_visible("#sidebar")
        say(page, "A word that is long: " + "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```")
        assert fits(page)
        page.click("#open-sidebar")
        assert page.is_visible("#sidebar") and fits(page) and page.evaluate("document.activeElement.id") == "close-sidebar"
        page.keyboard.press("Escape")
        assert not page.is_visible("#sidebar") and page.evaluate("document.activeElement.id") == "open-sidebar"
        page.click("#open-sidebar")
        page.locator("#conversations a").last.click()
        comes(page, "document.querySelectorAll('.message.user').length === 4")
        assert not page.is_visible("#sidebar")
        page.click("#open-map")
        page.wait_for_selector(".parts li")
        assert page.is_visible("#map") and fits(page)
        screenshot(page, "page-narrow.png")
        page.locator(".parts button").nth(1).click()
        assert not page.is_visible("#map") and page.evaluate("document.activeElement.dataset.role") == "user"


def test_a_key_is_asked_for_and_an_answer_can_be_stopped(slow, visit):
    with visit(slow, expected=("status of 401",)) as page:
        for key in ("wrong", "the-key"):
            page.wait_for_selector("#key-dialog[open]")
            assert page.is_visible("#key-wrong") == (key != "wrong")
            page.keyboard.press("Escape")
            page.fill("#key", key)
            page.keyboard.press("Enter")
            page.wait_for_timeout(300)
        page.wait_for_selector("#model:not(:empty)")
        assert page.evaluate("sessionStorage.getItem('kvlocal-key')") == "the-key" and page.evaluate("localStorage.length") == 0
        say(page, "Tell me a long story of the sea.", wait=False)
        assert until(lambda: len(texts(page, "assistant")[-1]) > 80, 60)
        # what is typed meanwhile stays, and Enter does not send it
        page.fill("#message", "And then?")
        page.keyboard.press("Enter")
        assert page.input_value("#message") == "And then?" and len(texts(page, "user")) == 1
        page.keyboard.press("Escape")
        ended(page)
        identity = shown(page)
        said = kept(slow, identity, Authorization="Bearer the-key")
        assert [each["role"] for each in said] == ["user", "assistant"]
        assert len("".join(texts(page, "assistant")[-1].split())) <= len("".join(said[-1]["content"].split())) + 3
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:visible")
        assert until(lambda: len(texts(page, "assistant")[-1]) > 10, 60)
        # beside it another conversation waits for the one slot there is, and is stopped before its answer begins
        page.click("#new")
        say(page, "Hello!", wait=False)
        page.wait_for_selector(".waits")
        page.click("#stop")
        ended(page)
        assert page.locator(".message .error").inner_text() == "It was stopped before the answer began."
        page.locator("#conversations a").first.click()
        comes(page, "document.querySelectorAll('.message.user').length === 2")
        page.click("#stop")
        ended(page)
        # it went on where it was
        assert shown(page) == identity and len(kept(slow, identity, Authorization="Bearer the-key")) == 4
        # what was not sent is there again
        page.click("#new")
        assert page.input_value("#message") == "Hello!"


def test_edit_regenerate_and_fork_leave_the_conversation_as_it_was(server, visit):
    with visit(server) as page:
        say(page, "My boat is green.")
        say(page, "How many letters has its colour?")
        first, before = shown(page), kept(server, shown(page))
        action(page, "user", 1, "Edit")
        page.keyboard.press("Escape")
        assert texts(page, "user")[1] == "How many letters has its colour?"
        action(page, "user", 1, "Edit")
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type("Which colour is it?")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("In a word.")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:visible")
        ended(page)
        edited = shown(page)
        assert edited != first and kept(server, edited)[:2] == before[:2] and kept(server, edited)[2]["content"] == "Which colour is it?\nIn a word."
        page.go_back()
        comes(page, f"location.hash === '#{first}' && document.querySelectorAll('.message.user')[1].textContent.includes('letters')")
        page.go_forward()
        comes(page, f"location.hash === '#{edited}' && document.querySelectorAll('.message.user')[1].textContent.includes('word')")
        action(page, "assistant", 1, "Regenerate")
        page.wait_for_selector("#stop:visible")
        ended(page)
        again = shown(page)
        # at temperature 0 it says the same
        assert again not in (first, edited) and kept(server, again) == kept(server, edited)
        # one turn more in each of two that said the same stays in each
        page.goto(f"{server.address}/#{edited}")
        comes(page, "document.querySelectorAll('.message.user').length === 2")
        say(page, "Thank you.")
        assert shown(page) == edited and len(kept(server, edited)) == 6 and len(kept(server, again)) == 4
        action(page, "assistant", 2, "Fork")
        assert page.is_visible("#note") and len(texts(page, "user")) == 3 and page.evaluate("location.hash") == ""
        say(page, "Goodbye.")
        forked = shown(page)
        assert forked != edited and kept(server, forked)[:6] == kept(server, edited) and not page.is_visible("#note")
        assert kept(server, first) == before


def test_a_conversation_is_deleted_after_a_question(server, visit):
    with visit(server) as page:
        say(page, "A conversation that nobody needs.")
        identity = shown(page)
        for answer, there in (("Cancel", True), ("Delete", False)):
            page.locator("#conversations li", has_text="nobody needs").hover()
            page.get_by_role("button", name="Delete “A conversation that nobody needs.”").click()
            page.locator("#confirm-dialog").get_by_role("button", name=answer).click()
            page.wait_for_selector("#confirm-dialog", state="hidden")
            assert until(lambda there=there: (server.get(f"/conversations/{identity}").status == 200) == there)
        page.wait_for_selector(".welcome")
        assert page.locator("#conversations li", has_text="nobody needs").count() == 0


def test_the_keyboard_reaches_everything(server, visit):
    with visit(server) as page:
        say(page, "Hello!")
        identity = shown(page)
        page.locator(".skip").focus()
        assert page.evaluate("document.querySelector('.skip').getBoundingClientRect().top >= 0")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "message" and shown(page) == identity
        page.locator(".skip").focus()
        describe = """() => {
            const element = document.activeElement;
            const label = element.getAttribute("aria-label") || element.labels?.[0]?.textContent || element.textContent;
            return [element.localName, label.trim(), getComputedStyle(element).outlineStyle];
        }"""
        reached = []
        while len(reached) < 60:
            page.keyboard.press("Tab")
            reached.append(page.evaluate(describe))
            if reached[-1][1].startswith("Turn 1, answer"):
                break
        labels = [label for _, label, _ in reached]
        order = ("New conversation", "Delete “Hello!”", "Dark or light", "Edit the message of turn 1", "Fork after the answer of turn 1", "Message",
                 "Send", "Turn 1, you")  # fmt: skip
        for one, next_one in pairwise(order):
            at = [next(i for i, label in enumerate(labels) if label.startswith(each)) for each in (one, next_one)]
            assert at[0] < at[1], (one, next_one)
        assert all(label and (outline != "none" or name == "textarea") for name, label, outline in reached)


def test_what_goes_wrong_is_said_and_nothing_typed_is_lost(server, visit):
    with visit(server, expected=("ERR_FAILED", "status of 404")) as page:
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.fill("#message", "Is anybody there?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".message .error")
        assert "cannot be reached" in page.locator(".message .error").inner_text()
        page.reload()
        assert page.input_value("#message") == "Is anybody there?"
        page.unroute("**/v1/chat/completions")
        page.locator("#message").press("Enter")
        page.wait_for_selector("#stop:visible")
        ended(page)
        assert kept(server, shown(page))[0]["content"] == "Is anybody there?" and page.input_value("#message") == ""
        page.goto(f"{server.address}/#no-such-conversation")
        page.wait_for_selector("#complaint:visible")
        assert "no conversation" in page.locator("#complaint").inner_text()


# What is written


HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> <a href='javascript:alert(3)'>x</a> <b>bold</b> &lt;i&gt;"


def test_html_stays_text(server, visit):
    with visit(server) as page:
        say(page, HOSTILE)
        assert texts(page, "user") == [HOSTILE]
        page.wait_for_selector("#conversations a")
        answer = rendered(page, f"{HOSTILE}\n\n[a](javascript:alert(4)) [b](data:text/html,x) ![c](https://example.org/c.png) [d](https://example.org)")
        assert answer["text"].startswith(HOSTILE.split(" &lt;", 1)[0])
        assert answer["names"] == ["a", "a", "p", "p", "span", "span"]
        assert answer["links"] == ["https://example.org/c.png", "https://example.org/"]


def rendered(page, text):
    """A text as the page shows it: its HTML, its text, the elements in it by name, and where its links lead."""
    return page.evaluate(
        """async (text) => {
            const { render } = await import("./page/markdown.js");
            const box = document.createElement("div");
            box.append(render(text));
            const all = [...box.querySelectorAll("*")];
            const links = all.filter((each) => each.href).map((each) => each.href);
            return { html: box.innerHTML, text: box.textContent, names: all.map((each) => each.localName).sort(), links };
        }""",
        text,
    )


@pytest.fixture(scope="module")
def a_page(server, browser):
    page = browser.new_page()
    page.goto(server.address)
    yield page
    page.close()


LINK = 'target="_blank" rel="noopener noreferrer nofollow"'


@pytest.mark.parametrize("text, html", [
    ("a *b* **c** ***d*** ~~e~~ `f`", "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f</code></p>"),
    ("snake_case_name 2 * 3 * 4 ~ 5 **open", "<p>snake_case_name 2 * 3 * 4 ~ 5 **open</p>"),
    ("*a **b** c* _d_", "<p><em>a <strong>b</strong> c</em> <em>d</em></p>"),
    ("``a ` b`` `open", "<p><code>a ` b</code> `open</p>"),
    (r"\*a\* \<b\> c\d", "<p>*a* &lt;b&gt; c\\d</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("# A\n### B ##\ntext\n---", "<h3>A</h3><h5>B ##</h5><p>text</p><hr>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n4. b\n\n   c", '<ol start="3"><li>a</li><li>b<p>c</p></li></ol>'.replace("b<p>c</p>", "bc")),
    ("- [x] a\n- [ ] b", None),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("```python\na < b\n\n  c\n```\nd", '<pre tabindex="0" data-language="python"><code>a &lt; b\n\n  c</code></pre><p>d</p>'),
    ("~~~\nstill open", '<pre tabindex="0"><code>still open</code></pre>'),
    ("| a | b |\n|---|--:|\n| 1 | 2 \\| 3 |\n| 4 |", None),
    ("[a *b*](https://x.org/c_d \"t\") <https://y.org>, https://z.org/e_f.", f'<p><a href="https://x.org/c_d" {LINK}>a <em>b</em></a> '
     f'<a href="https://y.org" {LINK}>https://y.org</a>, <a href="https://z.org/e_f" {LINK}>https://z.org/e_f</a>.</p>'),
    ("[not a link] [x](", "<p>[not a link] [x](</p>"),
])  # fmt: skip
def test_markdown(a_page, text, html):
    found = rendered(a_page, text)
    if html is not None:
        assert found["html"] == html
    elif "[x]" in text:
        assert found["names"] == ["input", "input", "li", "li", "ul"]
    else:
        assert found["names"].count("td") == 4 and found["names"].count("th") == 2 and "2 | 3" in found["text"]


PIECES = ("*", "**a ", "_a_", "*a _b [c ", "~~a", "[", "[a](", "]", "![", "`", "` `` ", "<", "http://", "\\", "```", "> ", "- ", "# ", "1. a\n\n",
          " " * 6 + "- a\n", "|", "|-", "a|b\n-|-\n")  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_no_text_makes_the_page_hang(a_page, piece):
    text = piece * (50_000 // len(piece))
    milliseconds = a_page.evaluate(
        """async (text) => {
            const { render } = await import("./page/markdown.js");
            const begun = performance.now();
            render(text);
            return performance.now() - begun;
        }""",
        text,
    )
    assert milliseconds < 3000
