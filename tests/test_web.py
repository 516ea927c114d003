"""The chat page in a real browser (chromium, by playwright), on real servers of tiny models."""

import codecs
import json
import os
import re
import shutil
from math import exp

import pytest
from safetensors.torch import load_file, save_file

from corpus.inspect import InspectConfig, inspect
from tests.serving import Served, make_model

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here")

XSS = "<img src=x onerror='window.caught=1'><script>window.caught=1</script>{{7*7}}&lt;b&gt;"


def talkative(folder, tokenizer, template=None, **shape):
    """A tiny model that never ends by itself: control ids' rows are 0, never among the top 50."""
    path = make_model(folder, tokenizer, template, **shape) / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][: tokenizer.im_end_id + 1] = 0
    save_file(weights, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("web") / "chatty"
    return talkative(folder, tiny_tokenizer, "chatml", sequence_length=2048)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts servers, which end with the module."""
    logs, begun = tmp_path_factory.mktemp("web_logs"), []

    def start(folder, **knobs):
        begun.append(Served(logs / f"{len(begun)}.log", folder, **knobs).ready())
        return begun[-1]

    yield start
    for one in begun:
        one.kill()


@pytest.fixture(scope="module")
def server(start, folder):
    return start(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    home = os.environ | {"HOME": str(tmp_path_factory.mktemp("home"))}
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], env=home)
        yield browser
        browser.close()


class Chat:
    """The page of a server, open in a browser of its own, and what a person does with it."""

    def __init__(self, browser, server, width=1000, before=None, **context):
        self.server = server
        size = {"width": width, "height": 800}
        self.page = browser.new_context(viewport=size, **context).new_page()
        self.page.set_default_timeout(30_000)
        self.complaints = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda line: self.complaints.append(line.text))
        if before:
            self.page.add_init_script(before)
        self.page.goto(server.url)
        self.draft, self.go, self.notice = map(self.page.locator, ("#draft", "#go", "#notice"))
        self.said, self.answers = map(self.page.locator, (".said", ".assistant .said, .written"))

    def ready(self):
        expect(self.page.locator("#about")).to_contain_text("model")
        return self

    def set(self, **settings):
        self.press("Settings")
        for label, value in settings.items():
            self.page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
        self.page.keyboard.press("Escape")
        return self

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def ask(self, text):
        self.draft.fill(text)
        self.draft.press("Enter")

    def hear(self, text):
        """Asks, and waits for the end of the answer."""
        self.ask(text)
        self.settle()

    def settle(self):
        expect(self.go).not_to_have_accessible_name("Stop", timeout=30_000)
        return self

    def texts(self):
        """The messages, as they are kept; Markdown shows answers otherwise."""
        if self.page.locator(".page").count():
            return self.said.all_text_contents()
        return self.page.evaluate("state.chat.messages.map(({ content }) => content)")

    def answer_with(self, *texts, status=200, **fields):
        """Lets the page hear these answers, one by one, in the place of the server's."""
        bodies = [events(text, **fields) if status == 200 else "{}" for text in texts]

        def fulfil(route):
            route.fulfill(status=status, body=bodies.pop(0), content_type="text/event-stream")

        self.page.route(ANSWERS, fulfil, times=len(texts))

    def export(self, name="Export"):
        """Returns the path of the file that a button of the settings gives."""
        self.press("Settings")
        with self.page.expect_download() as download:
            self.press(name)
        self.page.keyboard.press("Escape")
        return download.value.path()

    def listed(self):
        """The names in the list of conversations, which is left open."""
        if not self.page.locator("#chats").is_visible():
            self.press("Conversations")
        return self.page.locator("#entries .pick span:first-child").all_text_contents()

    def lists(self, *names):
        """Waits until the list has these names: another tab's doings arrive when they arrive."""
        self.listed()
        expect(self.page.locator("#entries .pick span:first-child")).to_have_text(names)

    def load(self, path, content):
        """Imports a file."""
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        self.page.set_input_files("#file", path)

    def edit(self, number, text):
        self.page.get_by_role("button", name="Edit").nth(number).click()
        self.page.get_by_label("New text").fill(text)
        self.page.keyboard.press("Enter")
        self.settle()


@pytest.fixture
def opened(browser, server):
    """Opens pages; whatever happens on them, the console stays silent, the policy unbroken."""
    chats = []

    def opened(one=server, **knobs):
        chats.append(Chat(browser, one, **knobs))
        return chats[-1]

    yield opened
    failed = "Failed to load resource"  # as a test brought about
    complaints = [line for chat in chats for line in chat.complaints if failed not in line]
    for chat in chats:
        chat.page.context.close()
    assert complaints == []


ANSWERS = "**/v1/chat/completions"


def events(text, finish="stop", **logprobs):
    """An answer in one piece, as the server streams it."""
    choice = {"delta": {"content": text}, "finish_reason": finish, "logprobs": None}
    choice |= {"logprobs": {"content": []} | logprobs} if logprobs else {}
    usage = {"total_tokens": 9}
    chunks = {"choices": [choice], "usage": None}, {"choices": [], "usage": usage}
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def reference(server, text, **fields):
    """What a client gets for the same question."""
    fields |= {"messages": [{"role": "user", "content": text}], "logprobs": True}
    return server.ask("/v1/chat/completions", fields | {"top_logprobs": 5})[1]["choices"][0]


SEEDED = {"Longest_answer": 24, "Seed": 7}
FIELDS = {"max_tokens": 24, "seed": 7}


# ---- a conversation


def test_the_page_shows_what_the_server_answers(opened, server):
    chat = opened().ready().set(**SEEDED)
    chat.hear("What is the sun?")
    right = reference(server, "What is the sun?", **FIELDS)
    assert chat.texts() == ["What is the sun?", right["message"]["content"]]
    chat.press("Probabilities")
    assert "".join(chat.answers.all_text_contents()).strip() == chat.texts()[1]
    remark = r"^24 tokens(, \d+ per second)? · reached the length limit$"  # all may come at once
    expect(chat.page.locator(".remark").last).to_have_text(re.compile(remark))
    assert right["finish_reason"] == "length"
    expect(chat.page.locator("#announce")).to_have_text(chat.texts()[1].strip())
    chat.hear("And then?")
    assert len(chat.texts()) == 4
    sent = [{"role": r, "content": t} for r, t in zip(["user", "assistant", "user"], chat.texts())]
    counted = server.ask("/tokenize", {"messages": sent})[1]["count"] + 24
    expect(chat.page.locator("#used")).to_have_text(f"{counted} / 2,048 tokens")


def test_an_answer_is_written_as_it_comes_and_stops_when_told(opened, server):
    chat = opened().ready()
    chat.ask("Tell me all.")
    expect(chat.go).to_have_accessible_name("Stop")
    expect(chat.answers).to_have_text(re.compile(".{300}", re.S))
    before = chat.answers.text_content()
    chat.go.click()
    chat.settle()
    assert chat.answers.text_content().startswith(before[:20])
    remark = re.compile(r"^\d+ tokens, \d+ per second · stopped$")
    expect(chat.page.locator(".remark").last).to_have_text(remark)
    server.until(lambda: server.metric("batch_size") == 0)
    chat.ask("Again.")
    expect(chat.answers.nth(1)).to_have_text(re.compile(".", re.S))
    chat.page.keyboard.press("Escape")
    chat.settle()
    assert len(chat.texts()) == 4


def test_regenerate_and_edit_keep_what_was_there_with_all_that_followed(opened):
    chat = opened().ready().set(Longest_answer=8)
    for text in ("One", "Two", "Three"):
        chat.hear(text)
    first = chat.texts()
    chat.press("Answer again")
    chat.settle()
    again = chat.texts()
    assert again[:5] == first[:5]
    assert len(again) == 6
    assert again[5] != first[5]
    versions = chat.page.get_by_role("group", name="Versions")
    expect(versions).to_have_text("2/2")
    chat.press("Version before")
    assert chat.texts() == first
    expect(versions).to_have_text("1/2")
    expect(chat.page.get_by_role("button", name="Version before")).to_be_disabled()
    chat.press("Version after")
    assert chat.texts() == again
    chat.edit(1, "Changed")
    assert chat.texts()[:3] == [*first[:2], "Changed"]
    assert len(chat.texts()) == 4
    chat.page.reload()
    chat.ready().press("Version before")
    assert chat.texts() == again
    expect(chat.page.get_by_role("button", name="Version before").first).to_be_focused()
    expect(versions).to_have_text(["1/2", "2/2"])
    chat.page.get_by_role("button", name="Edit").first.click()
    chat.page.keyboard.press("Escape")
    assert chat.texts() == again


def test_a_reload_keeps_everything_and_so_does_a_new_conversation(opened):
    chat = opened().ready().set(Longest_answer=8, Temperature=0.5)
    chat.page.evaluate("document.getElementById('settings').showModal()")
    chat.page.get_by_label("System prompt").fill("Be brief.")
    chat.page.keyboard.press("Escape")
    chat.hear("Keep this.\n  and this")
    chat.press("Probabilities")
    chat.draft.fill("half a thought")
    texts = chat.texts()
    chat.page.reload()
    chat.ready()
    assert chat.texts() == texts
    assert chat.draft.input_value() == "half a thought"
    expect(chat.page.locator(".token")).not_to_have_count(0)
    assert chat.page.get_by_label("Temperature", exact=True).input_value() == "0.5"
    assert chat.page.get_by_label("System prompt").input_value() == "Be brief."
    chat.press("New conversation")
    assert chat.texts() == []
    expect(chat.page.get_by_role("heading", name="Ask something small.")).to_be_visible()
    assert chat.draft.input_value() == "half a thought"
    assert chat.listed() == ["Keep this. and this"]
    chat.page.locator(".pick").click()
    assert chat.texts() == texts


# ---- text is text


def test_export_import_and_markup_stays_text(opened, tmp_path):
    chat = opened().ready().set(Longest_answer=4)
    chat.hear(XSS)
    texts = [(role, f"{XSS}\n  {role}") for role in ("user", "assistant") * 2]
    messages = [{"role": role, "content": text} for role, text in [("system", XSS), *texts]]
    chat.load(tmp_path / "hostile.json", {"messages": messages})
    expect(chat.notice).to_contain_text("Imported")
    assert chat.texts() == [message["content"] for message in messages[1:]]
    assert all(XSS in text for text in chat.said.all_text_contents())
    assert chat.page.locator("#conversation :is(img, script, b)").count() == 0
    assert chat.page.get_by_label("System prompt").input_value() == XSS
    assert json.loads(chat.export().read_text()) == {"messages": messages}
    rows = [json.loads(line) for line in chat.export("Export all").read_text().splitlines()]
    assert rows[0] == {"messages": messages}
    assert [len(row["messages"]) for row in rows] == [5, 2]
    chat.load(tmp_path / "all.jsonl", "\n".join(map(json.dumps, rows)))
    assert sorted(chat.listed()) == sorted([XSS, f"{XSS} user"] * 2)
    assert chat.page.evaluate("window.caught") is None


def test_an_empty_answer_is_kept_and_not_shown_to_the_model(opened, tmp_path, capsys):
    chat = opened().ready()
    chat.answer_with("", "Fine.", "")
    for text in ("Hello", "How are you?", "And now?"):
        with chat.page.expect_request(ANSWERS) as asked:
            chat.hear(text)
    sent = [message["content"] for message in asked.value.post_data_json["messages"]]
    assert sent == ["How are you?", "Fine.", "And now?"]
    expect(chat.page.locator(".remark").first).to_have_text("")
    expect(chat.page.locator(".remark").nth(1)).to_have_text("an empty answer")
    texts = ["Hello", "", "How are you?", "Fine.", "And now?", ""]
    chat.page.reload()
    assert chat.ready().texts() == texts
    for name in ("Export", "Export all"):
        content = chat.export(name).read_text()
        chat.load(tmp_path / f"{name}.json", content)
        expect(chat.notice).to_contain_text("Imported")
        assert chat.texts() == texts
        inspect(InspectConfig(str(tmp_path / f"{name}.json")))
        assert re.search(r" \d passed over: empty-answer \(", capsys.readouterr().out)
    chat.load(tmp_path / "asked.json", [{"role": "user", "content": "why"}])
    assert chat.texts() == []
    assert chat.draft.input_value() == "why", "an unanswered question is yet to be sent"


def test_what_is_no_conversation_changes_nothing(opened, tmp_path):
    chat = opened().ready()
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    chat.load(tmp_path / "right.json", messages)
    tool = {"messages": [{"role": "tool", "content": ""}]}
    for number, content in enumerate(["{", "[1]", tool, "3"]):
        chat.load(tmp_path / f"{number}.json", content)
        expect(chat.notice).to_contain_text(f"{number}.json is not a conversation: ")
    assert chat.texts() == ["why", "so"]


# ---- Markdown

BLANK = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = [  # text, and the elements it becomes; an element's attributes come in the page's order
    ("**a** *b* `c` ~~d~~ ***e*** __f__ _g_",
     "<p><strong>a</strong> <em>b</em> <code>c</code> <del>d</del> <strong><em>e</em></strong> "
     "<strong>f</strong> <em>g</em></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("a_b_c 2*3*4 * x * \\*y\\* **z", "<p>a_b_c 2*3*4 * x * *y* **z</p>"),
    ("*a **b* c `d", "<p><em>a **b</em> c `d</p>"),
    ("``a`b`` `**c**`", "<p><code>a`b</code> <code>**c**</code></p>"),
    ("[a *b*](https://x.org/) [c](mailto:d@e.org)",
     '<p><a href="https://x.org/">a <em>b</em></a> <a href="mailto:d@e.org">c</a></p>'),
    ("see http://x.org/a?b=1. [1] [", '<p>see <a href="http://x.org/a?b=1">http://x.org/a?b=1</a>. '
     "[1] [</p>"),
    ("[a](javascript:b) [c](data:d) [e](//f.org) [g](h)",
     "<p>[a](javascript:b) [c](data:d) [e](//f.org) [g](h)</p>"),
    ("# a #\n\n### b\nc\nd", '<h3 class="major">a</h3><h3>b</h3><p>c\nd</p>'),
    ("#a\n####### b", "<p>#a\n####### b</p>"),
    ("a\n- b\n- c\n  d\n\n  e\n- f\n\ng",
     "<p>a</p><ul><li><p>b</p></li><li><p>c\nd</p><p>e</p></li><li><p>f</p></li></ul><p>g</p>"),
    ("3. a\n   * b\n     1. c\n4) d",
     '<ol start="3"><li><p>a</p><ul><li><p>b</p><ol start="1"><li><p>c</p></li></ol></li></ul>'
     "</li><li><p>d</p></li></ol>"),
    ("> a\n> - b\n\nc", "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote><p>c</p>"),
    ("***\na\n- - -", "<hr><p>a</p><hr>"),
    ("|a|b|\n|:-:|--:|\n|*c*|d\\|e|f|\n|g|",
     '<table><thead><tr><th class="centre">a</th><th class="right">b</th></tr></thead><tbody><tr>'
     '<td class="centre"><em>c</em></td><td class="right">d|e</td></tr><tr>'
     '<td class="centre">g</td></tr></tbody></table>'),
    ("a | b\n- | -\n- | - | -", "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr>"
     "<td>-</td><td>-</td></tr></tbody></table>"),
    ("a | b\n---", "<p>a | b</p><hr>"),
    ("~~~\n**a**\n\n<b>\n~~~~\nb", "<pre>**a**\n\n&lt;b&gt;</pre><p>b</p>"),
    ("<b>a</b> &lt;", "<p>&lt;b&gt;a&lt;/b&gt; &amp;lt;</p>"),
    ("> " * 99 + "a", "<blockquote>" * 6 + f"<p>{'&gt; ' * 93}a</p>" + "</blockquote>" * 6),
]  # fmt: skip


def test_markdown_becomes_elements(opened):
    page = opened().ready().page
    shown = """text => {
        const holder = make("div", {}, ...markdown(text));
        for (const pre of holder.querySelectorAll("pre")) {
            pre.parentElement.replaceWith(make("pre", {}, pre.textContent));
        }
        for (const wide of holder.querySelectorAll(".wide")) wide.replaceWith(wide.firstChild);
        for (const a of holder.querySelectorAll("a")) {
            if (a.rel !== "noopener noreferrer" || a.target !== "_blank") throw a.outerHTML;
            for (const name of ["title", "target", "rel"]) a.removeAttribute(name);
        }
        return holder.innerHTML.replaceAll(' class=""', "");
    }"""
    for text, html in MARKDOWN:
        assert page.evaluate(shown, text) == html, text


def test_code_has_its_language_and_can_be_copied(opened, tmp_path):
    chat = opened(permissions=["clipboard-read", "clipboard-write"]).ready()
    answer = "Here:\n\n```python\nx = '<b>'\n  y\n```\n\nSo.\n```\nhalf"
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": answer}]
    chat.load(tmp_path / "code.json", messages)
    expect(chat.answers.locator("pre")).to_have_text(["x = '<b>'\n  y", "half"])
    expect(chat.answers.locator("figcaption")).to_have_text(["python", "code"])
    chat.page.get_by_role("button", name="Copy code").first.click()
    expect(chat.page.locator("#announce")).to_have_text("Copied.")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "x = '<b>'\n  y"


def test_an_answer_under_way_is_drawn_like_the_whole_and_keeps_its_beginning(opened):
    page = opened().ready().page
    text = "\n\n".join(text for text, _ in MARKDOWN)
    kept = """text => {
        const element = make("div", {}), first = [];
        for (let end = 1; end <= text.length; end++) {
            renew(element, markdown(text.slice(0, end)));
            if (end > 99) first.push(element.firstChild);
        }
        const whole = make("div", {}, ...markdown(text));
        return [element.isEqualNode(whole), new Set(first).size];
    }"""
    assert page.evaluate(kept, text) == [True, 1]


# ---- probabilities


def spans(choice):
    """The tokens of an answer as shown: a character spread over several is with the last."""
    decoder, shown = codecs.getincrementaldecoder("utf-8")("replace"), []
    for entry in choice["logprobs"]["content"]:
        text = decoder.decode(bytes(entry["bytes"]))
        text = text if shown else text.lstrip()
        if text:
            shown.append((text, entry))
    half = decoder.decode(b"", final=True)
    return shown + [(half, entry)] * bool(half)


def visible(entry):
    name = f"<0x{entry['bytes'][0]:x}>" if entry["token"] == "\ufffd" else entry["token"]
    return name.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


def test_probabilities_by_pointer_and_by_keyboard(opened, server):
    chat = opened().ready().set(**SEEDED)
    chat.hear("Why?")
    chat.press("Probabilities")
    choice = reference(server, "Why?", **FIELDS)
    tokens, right = chat.page.locator(".token"), spans(choice)
    peek = chat.page.get_by_role("tooltip")
    assert tokens.all_text_contents() == [text for text, _ in right]
    assert "".join(tokens.all_text_contents()).strip() == choice["message"]["content"]
    bounds = (0.9, 0.5, 0.2, 0.05)
    levels = [str(sum(exp(entry["logprob"]) < bound for bound in bounds)) for _, entry in right]
    assert [token.get_attribute("data-level") for token in tokens.all()] == levels
    tokens.nth(1).hover()
    expect(peek).to_be_visible()
    chat.page.mouse.move(0, 0)
    expect(peek).to_be_hidden()

    chat.draft.focus()
    while chat.page.evaluate("document.activeElement.className") != "token":
        chat.page.keyboard.press("Shift+Tab")
    for _, chosen in right[1:]:
        chat.page.keyboard.press("ArrowRight")
        top = chosen["top_logprobs"]
        rows = top + [chosen] * all(entry["bytes"] != chosen["bytes"] for entry in top)
        assert peek.locator("b").all_text_contents() == [visible(entry) for entry in rows]
        shares = [float(text.rstrip("%")) for text in peek.locator("li span").all_text_contents()]
        assert shares == pytest.approx([100 * exp(entry["logprob"]) for entry in rows], rel=0.06)
        assert peek.locator(".chosen b").all_text_contents() == [visible(chosen)]
    expect(tokens.last).to_be_focused()
    expect(tokens.last).to_have_accessible_description(re.compile("% likely here"))
    chat.page.keyboard.press("ArrowLeft")
    expect(tokens.nth(len(right) - 2)).to_be_focused()
    chat.page.keyboard.press("Escape")
    expect(peek).to_be_hidden()


def test_the_end_of_a_turn_is_a_token_with_its_probability(opened):
    chat = opened().ready()
    entries = [
        {"token": token, "bytes": list(token.encode()), "logprob": value}
        for token, value in [("<|im_end|>", -1.0), ("fox", -0.5)]
    ]
    end = entries[0] | {"top_logprobs": entries[::-1]}
    chat.answer_with("", end=end)
    chat.hear("Well?")
    chat.press("Probabilities")
    token = chat.page.locator(".token")
    expect(token).to_have_text("end of turn")
    assert token.get_attribute("data-level") == "2"
    token.hover()
    rows = chat.page.get_by_role("tooltip").locator("b")
    assert rows.all_text_contents() == ["fox", "<|im_end|>"]
    expect(chat.page.locator("#legend")).to_contain_text("How likely the model found each token")


# ---- settings


def test_settings_are_the_servers(opened, server):
    card = server.get("/v1/models").json["data"][0]
    chat = opened().ready()
    for name, limits in card["settings"].items():
        knob = chat.page.locator(f"#set-{name}")
        assert float(knob.get_attribute("min")) == limits["min"]
        assert float(knob.get_attribute("max")) == min(limits["max"], 2**53 - 1)
        assert knob.input_value() == ("" if limits["default"] is None else f"{limits['default']:g}")
    chat.set(Temperature=0.25, Longest_answer=3, Top_p=2)
    expect(chat.page.locator("#hint-top_p")).to_contain_text("must be less than or equal to 1")
    with chat.page.expect_request("**/v1/chat/completions") as asked:
        chat.ask("Hello")
    own = {"messages", "stream", "stream_options", "logprobs", "top_logprobs"}
    sent = {name: value for name, value in asked.value.post_data_json.items() if name not in own}
    assert sent == {"temperature": 0.25, "max_tokens": 3}
    chat.settle()
    chat.press("Settings")
    chat.press("Use the server's defaults")
    assert chat.page.locator("#set-temperature").input_value() == "0.8"


# ---- how it looks


def too_wide(chat):
    return chat.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_or_too_small_to_touch(opened, tmp_path, scheme):
    chat = opened(width=390, has_touch=True, is_mobile=True, color_scheme=scheme).ready()
    assert too_wide(chat) == 0
    chat.set(Longest_answer=24)
    chat.draft.fill("unbroken" * 60)
    chat.go.tap()
    chat.settle()
    chat.press("Probabilities")
    assert too_wide(chat) == 0
    for button in chat.page.get_by_role("button").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
        assert min(box["height"], box["width"]) >= 44, "room for a finger"
    chat.press("Settings")
    assert too_wide(chat) == 0
    fits = "document.getElementById('settings').scrollWidth <= 390"
    assert chat.page.evaluate(fits)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, tmp_path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    other = {"light": "dark", "dark": "light"}[scheme]
    still = {"reduced_motion": "reduce"}  # half faded in, a line has half its contrast
    chat = opened(width=390, color_scheme=other, **still).ready().set(Longest_answer=12)
    chat.press("Light or dark")
    found = [axe.run(chat.page)]
    text = "\n\n".join(text for text, _ in MARKDOWN)
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": text}]
    chat.load(tmp_path / "all.json", messages)
    found.append(axe.run(chat.page))
    chat.hear("And?")
    chat.press("Answer again")
    chat.settle()
    chat.press("Probabilities")
    chat.page.locator(".token").first.focus()
    found.append(axe.run(chat.page))
    for name in ("Conversations", "Settings"):
        chat.press(name)
        found.append(axe.run(chat.page))
        chat.page.keyboard.press("Escape")
    wrong = [(entry["id"], [node["html"] for node in entry["nodes"]])
             for result in found for entry in result.response["violations"]]  # fmt: skip
    assert wrong == []


def test_light_or_dark_is_the_systems_until_told_otherwise(opened):
    chat = opened(color_scheme="dark").ready()
    paper = lambda: chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = paper()
    chat.press("Light or dark")
    light = paper()
    assert light != dark
    chat.page.reload()
    assert chat.ready()
    assert paper() == light
    chat.press("Light or dark")
    assert paper() == dark
    chat.page.emulate_media(color_scheme="light")
    assert paper() == light, "as the system, so it follows that"


def test_everything_has_a_name_and_can_be_reached_by_keyboard(opened):
    chat = opened().ready().set(Longest_answer=4)
    keys, page = chat.page.keyboard, chat.page
    chat.draft.focus()
    keys.type("Hello")
    keys.press("Shift+Enter")
    keys.type("there")
    keys.press("Enter")
    expect(chat.answers).to_have_text(re.compile(".", re.S))
    chat.settle()
    assert chat.texts()[0] == "Hello\nthere"
    reached = []
    for _ in range(13):
        keys.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel"))
    names = {"Conversations", "Probabilities", "New conversation", "Light or dark", "Settings"}
    assert names | {"Edit", "Copy", "Answer again"} <= set(reached)
    chat.press("Settings")
    named = "e.ariaLabel || e.labels?.length || e.textContent.trim() || e.hidden"
    named += "|| document.getElementById(e.getAttribute('aria-labelledby'))"
    fields = page.locator("button, input, textarea").all()
    assert all(field.evaluate(f"e => {named}") for field in fields)


# ---- when something is in the way


def test_the_server_goes_and_comes_back(opened, start, folder):
    one = start(folder)
    chat = opened(one).ready()
    chat.ask("Tell me all.")
    expect(chat.answers).to_have_text(re.compile(".{20}", re.S))
    one.kill()
    expect(chat.notice).to_contain_text("The server does not answer")
    chat.settle()
    expect(chat.page.locator(".remark").last).to_contain_text("broke off")
    assert len(chat.answers.text_content()) >= 20
    chat.set(Longest_answer=4)
    chat.ask("Are you there?")
    expect(chat.notice).to_contain_text("The server does not answer")
    start(folder, port=one.port)
    expect(chat.notice).to_contain_text("Connected.", timeout=30_000)
    assert len(chat.texts()) == 2
    assert chat.draft.input_value() == "Are you there?"
    chat.press("Send")
    chat.settle()
    assert len(chat.texts()) == 4
    assert chat.texts()[2] == "Are you there?"


def test_a_server_that_wants_a_key(opened, start, folder, tmp_path):
    (tmp_path / "key").write_text("sesame-open")
    chat = opened(start(folder, api_key_file=tmp_path / "key"))
    dialog = chat.page.get_by_role("dialog", name="API key")
    tries = {"wrong": "answers only those who have its key"}
    tries["sesame-open"] = "did not accept this key"
    for key, words in tries.items():
        expect(dialog).to_contain_text(words)
        dialog.get_by_label("API key").fill(key)
        chat.page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    chat.ready().set(Longest_answer=4)
    chat.hear("Hello")
    chat.page.reload()
    chat.ready()
    expect(dialog).to_be_hidden()
    assert len(chat.texts()) == 2
    assert "sesame" not in chat.page.evaluate("JSON.stringify(localStorage)")
    assert "sesame" in chat.page.evaluate("JSON.stringify(sessionStorage)")


@pytest.mark.parametrize(
    ("status", "news"),
    [(400, "The server answered 400."), (429, "too many wait for an answer already"),
     (500, "The server answered 500."), (503, "connects by itself")],
)  # fmt: skip
def test_after_an_error_the_question_is_in_the_box_again(opened, status, news):
    chat = opened().ready().set(Longest_answer=4)
    chat.hear("One")
    before = chat.texts()
    chat.answer_with("", "", status=status)
    chat.ask("Two")
    expect(chat.notice).to_contain_text(news)
    assert chat.texts() == before
    chat.draft.fill(chat.draft.input_value() + "!")
    chat.draft.press("Enter")
    expect(chat.draft).to_have_value("Two!")
    with chat.page.expect_request(ANSWERS) as asked:
        chat.press("Try again") if status in (429, 500) else chat.press("Send")
    roles = [message["role"] for message in asked.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    chat.settle()
    whole = chat.texts()
    assert len(whole) == 4
    chat.answer_with("", "", status=status)
    chat.press("Answer again")
    expect(chat.notice).to_contain_text(news)
    assert chat.texts() == whole, "the answer that was there stays"
    chat.edit(0, "Zero")
    expect(chat.page.get_by_label("New text")).to_have_value("Zero")
    assert chat.texts() == whole


@pytest.fixture(scope="module")
def short(start, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "short"
    return start(talkative(folder, tiny_tokenizer, "chatml", sequence_length=128))


def test_a_draft_that_is_too_long_stays_in_the_box(opened, short):
    chat = opened(short).ready()
    long = "jumps over a lazy dog " * 60
    chat.draft.fill(long)
    expect(chat.notice).to_contain_text("Too long to send: the model reads 128 tokens at most")
    expect(chat.go).to_be_disabled()
    expect(chat.go).to_have_accessible_description(re.compile("Too long to send"))
    expect(chat.page.locator("#context")).to_have_class("full")
    count = short.ask("/tokenize", {"messages": [{"role": "user", "content": long}]})[1]["count"]
    expect(chat.page.locator("#used")).to_have_text(f"{count} / 128 tokens")
    chat.draft.press("Enter")
    assert chat.draft.input_value() == long
    chat.ask("fox " * 300)  # before it is measured
    expect(chat.notice).to_contain_text("Too long to send")
    assert chat.texts() == []
    assert chat.draft.input_value() == "fox " * 300
    too_big = {"status": 413, "body": "{}"}  # as the server answers to more than a megabyte
    chat.page.route("**/tokenize", lambda route: route.fulfill(**too_big), times=1)
    chat.draft.fill("very much")
    expect(chat.page.locator("#used")).to_have_text("Far more / 128 tokens")
    chat.draft.fill("fox")
    expect(chat.notice).to_be_hidden()
    expect(chat.go).to_be_enabled()


def test_a_full_context_forgets_the_oldest_turns_and_says_so(opened, short):
    chat = opened(short).ready().set(Longest_answer=12, System_prompt="Be a fox.")
    line, system = chat.page.locator(".horizon"), {"role": "system", "content": "Be a fox."}
    seen = []
    for number in range(6):
        with chat.page.expect_request(ANSWERS) as asked:
            chat.hear(f"the quick fox {number}")
        turns = [{"role": role, "content": text}
                 for role, text in zip(["user", "assistant"] * 6, chat.texts()[:-1])]  # fmt: skip
        fits = []
        for first in range(0, len(turns), 2):  # as sample.py --chat decides
            window = [system, *turns[first:]]
            if short.ask("/tokenize", {"messages": window})[1]["count"] + 12 <= 128:
                fits.append((first, window))
        first, window = fits[0]
        assert asked.value.post_data_json["messages"] == window
        assert line.count() == bool(first)
        seen.append(first)
    assert seen[0] == 0 < seen[-1]
    expect(line).to_have_text(
        "Above this line no longer seen: the model's context of 128 tokens is full"
    )
    above = "element => [...element.parentElement.children].indexOf(element)"
    assert line.evaluate(above) == seen[-1]
    assert len(chat.texts()) == 12
    chat.page.reload()
    chat.ready()
    assert line.evaluate(above) == seen[-1]
    chat.set(Longest_answer=127)  # more than there is room for: the context ends the answer
    chat.hear("on")
    expect(chat.page.locator(".remark").last).to_contain_text("the context is full")


# ---- several conversations


def test_conversations_are_listed_renamed_searched_and_deleted(opened):
    chat = opened().ready().set(Longest_answer=4)
    for text in ("apples", "pears", "plums"):
        chat.press("New conversation")
        chat.hear(text)
    assert chat.listed() == ["plums", "pears", "apples"]
    chat.press("Rename pears")
    chat.page.get_by_label("New name").fill("A fruit")
    chat.page.keyboard.press("Escape")
    chat.press("Rename pears")
    chat.page.get_by_label("New name").fill("A fruit")
    chat.page.keyboard.press("Enter")
    assert chat.listed() == ["plums", "A fruit", "apples"]
    search = chat.page.get_by_label("Search conversations")
    for wanted, names in {"PEAR": ["A fruit"], "fruit": ["A fruit"], "nuts": []}.items():
        search.fill(wanted)
        assert chat.listed() == names
        expect(chat.page.locator("#found")).to_have_text(f"{len(names)} of 3 conversations")
    search.fill("")
    chat.press("Delete plums")
    assert chat.texts() == []
    assert chat.listed() == ["A fruit", "apples"]
    chat.press("Undo")
    assert chat.listed() == ["plums", "A fruit", "apples"]
    chat.press("Delete apples")
    chat.page.keyboard.press("Escape")
    assert chat.listed() == ["plums", "A fruit"]
    chat.page.get_by_role("button", name="A fruit", exact=False).first.click()
    assert chat.texts()[0] == "pears"
    chat.hear("more")
    chat.page.reload()
    assert chat.ready().texts()[::2] == ["pears", "more"]
    assert chat.listed() == ["A fruit", "plums"]


class SecondTab(Chat):
    def __init__(self, first):
        class Same:
            new_context = staticmethod(lambda **_: first.page.context)

        super().__init__(Same, first.server)


def test_two_tabs_lose_nothing(opened):
    one = opened().ready().set(Longest_answer=4)
    one.hear("shared")
    two = SecondTab(one).ready()
    assert two.texts() == one.texts(), "a new tab shows the latest conversation"
    two.press("New conversation")
    two.hear("other")
    one.hear("more")
    one.lists("shared", "other")
    two.lists("shared", "other")
    two.page.locator(".pick").first.click()
    assert two.texts() == one.texts()
    one.page.keyboard.press("Escape")
    one.hear("third")
    expect(two.notice).to_contain_text("Another tab went on with this conversation")
    assert two.texts() == one.texts()
    one.set(Longest_answer=1500)
    two.draft.fill("kept")
    one.ask("long")
    expect(one.answers.last).to_have_text(re.compile(".{20}", re.S))
    two.ask("at the same time")  # in both at once: two conversations
    expect(one.notice).to_contain_text("it goes on as a copy")
    for tab in (one, two):
        expect(tab.page.locator(".live .said")).to_have_text(re.compile(".{20}", re.S))
        tab.page.keyboard.press("Escape")
        tab.settle()
    assert one.texts()[:-2] == two.texts()[:-4]
    assert (one.texts()[-2], two.texts()[-2]) == ("long", "at the same time")
    two.lists("shared", "shared", "other")
    two.press("Delete other")
    one.press("Conversations")
    one.lists("shared", "shared")
    two.page.locator("#entries [aria-current]").locator("..").get_by_label("Delete").click()
    one.lists("shared")
    two.press("Undo")  # the lower of two: each entry has its own
    one.lists("shared", "other")


def test_what_an_earlier_page_kept_is_still_there(opened):
    old = {"messages": [{"role": "user", "content": "old"}], "system": "Be old.", "draft": ""}
    old["messages"].append({"role": "assistant", "content": "so"})
    old |= {"settings": {"temperature": 0.5}, "odds": True}
    code = f"localStorage.length || localStorage.setItem('mini-llm-chat', {json.dumps(old)!r})"
    chat = opened(before=code).ready()
    assert chat.texts() == ["old", "so"]
    assert chat.page.get_by_label("Temperature", exact=True).input_value() == "0.5"
    assert chat.page.get_by_label("System prompt").input_value() == "Be old."
    chat.page.reload()
    assert chat.ready().listed() == ["old"]


def test_a_browser_that_keeps_nothing_says_so(opened):
    full = "Storage.prototype.setItem = () => { throw new Error('full') }"
    chat = opened(before=full).ready()
    chat.hear("lost?")
    expect(chat.page.locator("#unsaved")).to_be_visible()
    texts = chat.texts()
    chat.press("New conversation")
    chat.press("Go back")
    assert chat.texts() == texts


# ---- a base model


def test_a_base_model_continues_a_text(opened, start, tiny_tokenizer, tmp_path):
    one = start(talkative(tmp_path / "plain", tiny_tokenizer))
    chat = opened(one).ready().set(**SEEDED)
    expect(chat.page.locator("#about")).to_have_text("completion model")
    expect(chat.page.get_by_text("not to answer questions")).to_be_visible()
    expect(chat.page.locator("#system-part")).to_be_hidden()
    text = "once upon "
    chat.hear(text)
    for added in ("", " and "):
        fields = {"prompt": text} | FIELDS
        text += one.ask("/v1/completions", fields)[1]["choices"][0]["text"]
        assert chat.texts() == [text]
        text += added
        chat.hear(added)
    chat.edit(0, "there was")
    written = one.ask("/v1/completions", {"prompt": "there was"} | FIELDS)[1]["choices"][0]["text"]
    assert chat.texts() == ["there was" + written]
    chat.press("Probabilities")
    assert "".join(chat.page.locator(".token").all_text_contents()) == written
