"""The chat page in a real browser (chromium, by playwright), on real servers of tiny models."""

import codecs
import json
import os
import re
import shutil
from math import exp

import pytest
from safetensors.torch import load_file, save_file

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
        expect(self.page.locator(".live")).to_have_count(0, timeout=30_000)
        return self

    def texts(self):
        return self.said.all_text_contents()

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


def test_regenerate_and_edit_replace_what_follows(opened):
    chat = opened().ready().set(Longest_answer=8)
    for text in ("One", "Two", "Three"):
        chat.hear(text)
    first = chat.texts()
    chat.press("Answer again")
    chat.settle()
    assert chat.texts()[:5] == first[:5]
    assert len(chat.texts()) == 6
    assert chat.texts()[5] != first[5]
    chat.edit(1, "Changed")
    assert chat.texts()[:3] == [*first[:2], "Changed"]
    assert len(chat.texts()) == 4
    chat.page.get_by_role("button", name="Edit").first.click()
    chat.page.keyboard.press("Escape")
    assert len(chat.texts()) == 4


def test_a_reload_keeps_everything_and_a_new_conversation_can_be_undone(opened):
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
    chat.press("Undo")
    assert chat.texts() == texts


# ---- text is text


def test_export_import_and_markup_stays_text(opened, tmp_path):
    chat = opened().ready().set(Longest_answer=4)
    chat.hear(XSS)
    texts = [(role, f"{XSS}\n  {role}") for role in ("user", "assistant") * 2]
    messages = [{"role": role, "content": text} for role, text in [("system", XSS), *texts]]
    chat.press("Settings")
    chat.load(tmp_path / "hostile.json", {"messages": messages})
    expect(chat.notice).to_contain_text("Imported")
    assert chat.texts() == [message["content"] for message in messages[1:]]
    assert chat.page.locator("#conversation :is(img, script, b)").count() == 0
    assert chat.page.get_by_label("System prompt").input_value() == XSS
    chat.press("Settings")
    with chat.page.expect_download() as download:
        chat.press("Export")
    assert json.loads(download.value.path().read_text()) == {"messages": messages}
    chat.page.keyboard.press("Escape")
    chat.press("Undo")
    assert chat.texts()[0] == XSS
    assert len(chat.texts()) == 2
    assert chat.page.evaluate("window.caught") is None


def test_code_stands_apart_and_what_is_no_conversation_changes_nothing(opened, tmp_path):
    answer = "Here:\n\n```python\nx = '<b>'\n  y\n```\n\nSo.\n```\nhalf"
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": answer}]
    chat = opened().ready()
    chat.load(tmp_path / "code.json", messages)
    expect(chat.answers.locator("code")).to_have_text(["x = '<b>'\n  y", "half"])
    assert chat.texts()[1] == "Here:x = '<b>'\n  ySo.half"
    tool = {"messages": [{"role": "tool", "content": ""}]}
    for number, content in enumerate(["{", "[1]", tool, "3"]):
        chat.load(tmp_path / f"{number}.json", content)
        expect(chat.notice).to_contain_text(f"{number}.json is not a conversation: ")
    assert chat.texts() == ["why", "Here:x = '<b>'\n  ySo.half"]


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
    chat = opened(width=360, has_touch=True, is_mobile=True, color_scheme=scheme).ready()
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
        assert box["x"] + box["width"] <= 360
        assert box["height"] >= 36, "room for a finger"
    chat.press("Settings")
    assert too_wide(chat) == 0
    fits = "document.getElementById('settings').scrollWidth <= 360"
    assert chat.page.evaluate(fits)


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
    for _ in range(12):
        keys.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel"))
    names = {"Probabilities", "New conversation", "Light or dark", "Settings"}
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
    chat.press("Answer it")
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


def test_a_full_context_is_told_with_ways_out(opened, start, tiny_tokenizer, tmp_path):
    folder = talkative(tmp_path / "short", tiny_tokenizer, "chatml", sequence_length=64)
    chat = opened(start(folder)).ready().set(Longest_answer=4)
    chat.hear("the quick brown fox")
    chat.ask("jumps over a lazy dog " * 4)
    expect(chat.notice).to_contain_text("This model's context is 64 tokens; the prompt has")
    expect(chat.page.locator("#context")).to_have_class("full")
    chat.press("As long as fits")
    expect(chat.notice).to_contain_text("which leaves 0 for an answer")
    chat.press("Leave out the oldest turn")
    chat.settle()
    assert chat.texts()[0] == ("jumps over a lazy dog " * 4).strip()
    assert len(chat.texts()) == 2
    long = [{"role": "user", "content": "fox " * 9999}]
    chat.load(tmp_path / "long.json", long)
    count = chat.server.ask("/tokenize", {"messages": long})[1]["count"]
    expect(chat.page.locator("#used")).to_have_text(f"{count:,} / 64 tokens")
    expect(chat.page.locator("#context")).to_have_class("full")


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
