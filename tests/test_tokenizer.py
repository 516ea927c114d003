"""The tokenizer: nothing is lost on the way to ids and back, no text makes a control id, and
transformers agrees.
"""

import gzip
import json
import os
import random
import re
import shutil
import sys
from itertools import islice
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.tokenizer import train_tokenizer
from lib.chat_template import jinja
from lib.config import UserError
from lib.conversation import TEMPLATES, render, stop_ids, template_of
from lib.tokenizer import IM_END, IM_START, Tokenizer
from tests import SHARED
from tests.conftest import byte_level, sentencepiece_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CORPORA = SHARED / "corpora"

RARE = "quizzaciously"
# characters with which SentencePiece drops a document, each beside a word of its own
RESERVED = {"zigzag": "\0", "fuzzy": "\u2581", "jumpy": "\u2585", "wacky": "\uffff"}
RESERVED |= {"quirky": "\ud800"}
DOCUMENTS = [
    *topics.values(),
    " ".join(f"{RARE} {n}" for n in range(500)),  # a line of 9,000 bytes, the only with this word
    "caf\u00e9 \u2014 na\u00efve \u201cquotes\u201d\r\nand a second line\r\n" * 30,
    *(f"{word} {reserved} " * 200 for word, reserved in RESERVED.items()),
]
FRAGMENTS = [
    *(IM_START, IM_END, *"<s> </s> <unk> <pad> <0x41> <|im_ start|> <|endoftext|> [INST]".split()),
    *("\n", "\n\n", "\r\n", "\t", " ", "    "),
    *("\u2581", "\0", "\ufeff", "\u200b", "\u2028", "\uffff"),
    *("\U0001f600", "e\u0301", "\u4e2d\u6587", "user", "assistant", "Human:", "1", "!", "A"),
]
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=20), max_size=12).map("".join)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?\nTell me. "},
    {"role": "assistant", "content": "(Because) it is so."},
    {"role": "user", "content": "- And then"},
    {"role": "assistant", "content": "\n\nNothing more 1 \U0001f600\n"},
]
# without line breaks, which a foreign vocabulary joins to what stands before
PLAIN_TALK = [
    {"role": "user", "content": "Why so"},
    {"role": "assistant", "content": "It is so"},
] * 2
templates = pytest.mark.parametrize("template", TEMPLATES)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(DOCUMENTS, tmp_path_factory.mktemp("tokenizer") / "t.model", 2_000)


def named(tokenizer, ids):
    return tokenizer.decode(ids, controls=True)


def hugging_face(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    return "".join([*map(stream.push, ids), stream.flush()])


# ---- training


def test_no_document_is_dropped(tok):
    assert f"\u2581{RARE}" in tok.pieces  # from a line longer than SentencePiece's default limit
    assert set(RESERVED) <= {piece.strip("\u2581") for piece in tok.pieces}


def test_pieces_keep_to_the_places_where_texts_may_be_cut(tok):
    for piece in tok.pieces[262:]:
        assert not re.search(r"[\r\n][^\r\n]|[^\r\n][\r\n]", piece), piece
        assert not re.search("[^\u2581]\u2581", piece), piece
        assert not re.search(r"\d.|.\d", piece.replace("\u2581", "")), piece


def test_same_texts_give_the_same_bytes(tok, tmp_path):
    again = train_tokenizer(iter(DOCUMENTS), tmp_path / "again.model", 2_000)
    assert (again.model, again.sha256) == (tok.model, tok.sha256)
    assert (tmp_path / "again.model").read_bytes() == tok.model


@pytest.mark.parametrize("document", ["x" * 300_000, "\n" * 200_000, "a\n" * 100_000])
def test_training_survives_a_strange_document(document, tmp_path):
    assert train_tokenizer([*DOCUMENTS, document], tmp_path / "x.model", 1_000).vocab_size == 1_000


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world. " * 30], 5000, r"5000 is too large.* vocab_size=(\d+)"),
        *(
            (DOCUMENTS, size, rf"{size} is too small.* at least (\d+)")
            for size in (-1, 0, 261, 300)
        ),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_texts_names_the_size_that_does(
    tmp_path, texts, vocab_size, message
):
    path = tmp_path / "x.model"
    with pytest.raises(UserError, match=f"vocab_size {message}") as caught:
        train_tokenizer(texts, path, vocab_size)
    assert not list(tmp_path.iterdir())
    size = int(re.search(message, str(caught.value))[1])
    assert train_tokenizer(texts, path, size).vocab_size == size


# ---- text and ids


@settings(max_examples=500, deadline=None)
@given(text=TEXT)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert not set(ids) & set(range(6))
    assert tok.token_bytes()[ids].sum() == len(text.encode())
    assert tok.encode_batch([text, "x", text], num_threads=2) == [ids, tok.encode("x"), ids]


@pytest.mark.parametrize("id", [-1, 2_000, 2**40])
def test_an_id_outside_the_vocabulary_is_named(tok, id):
    with pytest.raises(UserError, match=rf"token id {id} is outside 0\.\.1999"):
        tok.decode([7, id])
    with pytest.raises(UserError, match=f"token id {id}"):
        tok.stream().push(id)


def test_lone_surrogates_are_refused(tok):
    for call in (lambda: tok.encode("ab\ud800"), lambda: tok.encode_batch(["ok", "ab\ud800"])):
        with pytest.raises(UserError, match=r"surrogate U\+D800 at character 2"):
            call()
    with pytest.raises(UserError, match="surrogate"):
        tok.encode("\u2581\udfff")


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 1_999) | st.integers(0, 261), max_size=30))
def test_streaming_is_decoding_for_any_ids(tok, ids):
    assert streamed(tok, ids) == tok.decode(ids)


@pytest.mark.parametrize("text", ["a" * 10**6, "<" * 10**6, " " * 10**6, "\u2581" * 10**5])
def test_a_megabyte_of_one_character_comes_back(tok, text):
    """Not timed here: a quadratic search would take minutes, which is the alarm."""
    assert tok.decode(tok.encode(text)) == text


# ---- the folder


def test_a_folder_comes_back(tok, tmp_path):
    tok.save(tmp_path, 512, "instruct")
    files = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    assert {path.name for path in tmp_path.iterdir()} == {*files, "special_tokens_map.json"}
    assert (tmp_path / "tokenizer.model").read_bytes() == tok.model
    back = Tokenizer.load(tmp_path)
    assert (back.sha256, back.template, back.pieces) == (tok.sha256, "instruct", tok.pieces)
    assert Tokenizer.load(tmp_path / "tokenizer.model").template is None
    back.save(tmp_path / "next", 512)
    assert Tokenizer.load(tmp_path / "next").template == "instruct"


def test_a_base_model_names_no_template_and_offers_chatml(tok, tmp_path):
    tok.save(tmp_path, 512)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    assert Tokenizer.load(tmp_path).template is None
    assert config["chat_template"] == jinja(TEMPLATES["chatml"])
    assert config["model_max_length"] == 512


@pytest.mark.parametrize(
    ("names", "template", "chatml"),
    [
        ({"chat_template_name": "chatml"}, "chatml_newline", "chatml_newline"),
        ({"chat_template_name": "instruct"}, "instruct", "chatml"),
        ({"chat_template_name": "chatml", "prompt_template": "chatml"}, "chatml", "chatml"),
        ({}, None, "chatml"),
    ],
)
def test_the_chatml_of_old_folders_is_kept(tok, tmp_path, names, template, chatml):
    """`names` are of a tokenizer_config.json; `chatml` is what a user gets who asks for that."""
    tok.save(tmp_path, 512)
    path = tmp_path / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text("utf-8")) | names)
    old = Tokenizer.load(tmp_path)
    assert (old.template, template_of(old, "chatml"), template_of(old, "chat")) == (
        template, chatml, "chat"
    )  # fmt: skip
    assert template_of(old) == (template or "chatml")
    old.save(tmp_path / "again", 512)
    assert Tokenizer.load(tmp_path / "again").template == template


def test_an_unknown_template_is_named(tok, tmp_path):
    for call, words in ((tok.save, (tmp_path, 512)), (render, (tok, CONVERSATION))):
        with pytest.raises(UserError, match="'llama': choose one of chatml, instruct, chat"):
            call(*words, "llama")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b""),
        ("tokenizer.model", b"not a model"),
        ("tokenizer.model", b"\xff\xfe" * 500),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b'{"chat_template_name": "zephyr"}'),
        ("tokenizer_config.json", b'{"chat_template_name": []}'),
        ("tokenizer_config.json", b'{"prompt_template": "zephyr"}'),
        ("tokenizer_config.json", b'{"tokenizer_model_sha256": 3, "prompt_template": 7}'),
    ],
)
def test_a_broken_folder_is_one_line(tok, tmp_path, name, content):
    tok.save(tmp_path, 512)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.model.*No such file"):
        Tokenizer.load(tmp_path / "none.model")


def test_a_flipped_bit_is_refused_or_harmless(tok):
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(tok.model)
        size = len(damaged)
        position = rng.choice([rng.randrange(size), rng.randrange(300), -1 - rng.randrange(300)])
        damaged[position] ^= 1 << rng.randrange(8)
        try:
            other = Tokenizer(bytes(damaged))
        except UserError:
            continue
        other.decode(other.encode("Hello (world) \U0001f600\n\n  x 12"))
        other.token_bytes()


def test_a_flipped_bit_in_a_saved_folder_is_always_refused(tok, tmp_path):
    tok.save(tmp_path, 512)
    rng = random.Random(1)
    for _ in range(100):
        damaged = bytearray(tok.model)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(UserError, match=r"checksum mismatch|damaged|no control symbol"):
            Tokenizer.load(tmp_path)


# ---- conversations

WRITTEN = {
    "chatml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhy?\nTell me.<|im_end|>\n"
        "<|im_start|>assistant\n(Because) it is so.<|im_end|>\n"
        "<|im_start|>user\n- And then<|im_end|>\n"
        "<|im_start|>assistant\nNothing more 1 \U0001f600<|im_end|>"
    ),
    "instruct": (
        "<s>Be brief.\n\n### Instruction:\nWhy?\nTell me.\n\n"
        "### Response:\n(Because) it is so.</s>\n\n"
        "### Instruction:\n- And then\n\n### Response:\nNothing more 1 \U0001f600</s>"
    ),
    "chat": (
        "<s>Be brief.\n\nHuman: Why?\nTell me.\n\nAssistant: (Because) it is so.</s>\n\n"
        "Human: - And then\n\nAssistant: Nothing more 1 \U0001f600</s>"
    ),
}
WRITTEN["chatml_newline"] = WRITTEN["chatml"].replace(IM_END, f"\n{IM_END}")
SUPERVISED = {
    "chatml": "(Because) it is so.<|im_end|>Nothing more 1 \U0001f600<|im_end|>",
    "chatml_newline": "(Because) it is so.\n<|im_end|>Nothing more 1 \U0001f600\n<|im_end|>",
    "instruct": "(Because) it is so.</s>Nothing more 1 \U0001f600</s>",
    "chat": " (Because) it is so.</s> Nothing more 1 \U0001f600</s>",
}
OPENING = {
    "chatml": "\n<|im_start|>assistant\n",
    "chatml_newline": "\n<|im_start|>assistant\n",
    "instruct": "\n\n### Response:\n",
    "chat": "\n\nAssistant:",
}


@templates
def test_a_conversation_as_text_and_its_supervised_part(tok, template):
    ids, mask = render(tok, CONVERSATION, template)
    assert len(ids) == len(mask)
    assert set(mask) == {0, 1}
    assert named(tok, ids) == WRITTEN[template]
    assert named(tok, [id for id, on in zip(ids, mask) if on]) == SUPERVISED[template]
    opened, silent = render(tok, CONVERSATION, template, add_generation_prompt=True)
    assert opened[: len(ids)] == ids
    assert silent[: len(ids)] == mask
    assert not any(silent[len(ids) :])
    assert named(tok, opened[len(ids) :]) == OPENING[template]


@templates
def test_an_answer_of_weight_0_is_context(tok, template):
    ids, mask = render(tok, CONVERSATION, template)
    context = len(render(tok, CONVERSATION[:3], template)[0])
    talk = [message | {"weight": index != 2} for index, message in enumerate(CONVERSATION)]
    assert render(tok, talk, template) == (ids, [0] * context + mask[context:])
    assert render(tok, talk[:3], template) == (ids[:context], [0] * context)


@templates
def test_the_prompt_for_an_answer_is_the_beginning_of_the_answered_conversation(tok, template):
    prompt, _ = render(tok, CONVERSATION[:2], template, add_generation_prompt=True)
    ids, mask = render(tok, CONVERSATION[:3], template)
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert stop_ids(tok, template) == ([2, 5] if template.startswith("chatml") else [2])
    assert stop_ids(tok, None) == [2]
    assert ids[-1] in stop_ids(tok, template)
    assert not set(ids[len(prompt) : -1]) & set(stop_ids(tok, template))


@settings(max_examples=200, deadline=None)
@given(contents=st.tuples(TEXT, TEXT).filter(lambda pair: all(text.strip() for text in pair)))
@templates
def test_contents_bring_no_control_ids_and_no_supervision(tok, template, contents):
    user, assistant = contents
    turn = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    ids, mask = render(tok, turn, template)
    frame = [1, 4, 5, 4, 5] if template.startswith("chatml") else [1, 2]
    assert [id for id in ids if id < 6] == frame
    answer = [id for id, on in zip(ids, mask) if on]
    assert tok.decode(answer).strip() == assistant.strip()
    # What meets at a cut encodes apart as it does in one: a run between controls is the encoding
    # of its text.
    for run in re.split("[\x01-\x06]", "".join(chr(id + 1) for id in ids)):
        piecewise = [ord(char) - 1 for char in run]
        if "\u2581" not in user + assistant:
            assert piecewise == tok.encode(tok.decode(piecewise))


def says(role, content):
    return {"role": role, "content": content}


TEXT_PART = {"type": "text", "text": "a "}
REFUSED = pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], "message 1: must be an object"),
        ([{"role": "user"}], r"message 1 \(user\): content must be text .*, got None"),
        ([says("user", "a"), says("user", ["b"])], r"message 2 \(user\): content .*\['b'\]"),
        ([says("root", "a")], "message 1: role must be one of system, user, assistant, got 'root'"),
        ([says(["user"], "a")], "message 1: role"),
        ([{"content": "a"}], "message 1: role .* got None"),
        ([says("user", " \n")], r"message 1 \(user\): content must be text that is not empty"),
        ([says("user", [TEXT_PART, {"type": "image", "url": "a"}])], "content must be text"),
        ([says("user", [TEXT_PART | {"text": " "}])], "content must be text"),
        ([says("user", [TEXT_PART | {"text": None}])], "content must be text"),
        ([says("user", "a\ud800")], "surrogate"),
    ],
)


@REFUSED
@templates
def test_what_is_no_conversation_is_named(tok, template, messages, complaint):
    with pytest.raises(UserError, match=complaint):
        render(tok, messages, template)


@REFUSED
@templates
def test_the_exported_template_refuses_what_render_refuses(chats, template, messages, complaint):
    errors = (TypeError, ValueError, pytest.importorskip("jinja2").TemplateError)
    with pytest.raises(errors):
        chats[template].apply_chat_template(messages)


# ---- transformers reads the folder as we do


SPECIAL = re.compile("</?s>|<unk>|<pad>|<[|]im_(start|end)[|]>")


def corpus_lines(count, every):
    """Yields `count` lines over all corpora, each `every`-th of a file, free of specials."""
    files = sorted(CORPORA.glob("*.jsonl.gz"))
    if not files:
        pytest.skip(f"no corpora in {CORPORA}")
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as rows:
            lines = (line for row in rows for line in json.loads(row)["text"].splitlines())
            usable = (x for x in lines if x and "\u2581" not in x and not SPECIAL.search(x))
            yield from islice(usable, 0, every * count // len(files) + every, every)


@pytest.fixture(scope="module")
def saved(tok, tmp_path_factory):
    """The tokenizer's saved folder, as transformers reads it."""
    tok.save(folder := tmp_path_factory.mktemp("saved"), 512)
    return hugging_face(folder)


def test_transformers_agrees_on_the_documentation(tok, saved):
    texts = [*topics.values(), *"\n".join(topics.values()).splitlines()]
    assert saved(texts)["input_ids"] == tok.encode_batch(texts)
    assert saved.all_special_tokens == ["<s>", "</s>", "<unk>", "<pad>", IM_START, IM_END]
    assert saved.model_max_length == 512
    for text in texts[:50]:
        assert saved.decode(tok.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | TEXT)
def test_transformers_agrees_on_any_text(tok, saved, text):
    text = SPECIAL.sub("", text.replace("\u2581", ""))
    if not SPECIAL.search(text):  # removing one can make one
        assert saved.encode(text) == tok.encode(text)


def test_transformers_agrees_on_real_text_at_full_size(tmp_path):
    """At vocab 32768, on more than 10,000 lines of every corpus (French and Spanish among them)."""
    pytest.importorskip("transformers")
    sample = list(corpus_lines(count=100_000, every=3))
    tokenizer = train_tokenizer(sample, tmp_path / "tokenizer.model", 32_768)
    tokenizer.save(tmp_path, 1_024)
    lines = list(corpus_lines(count=12_000, every=7))
    assert len(lines) >= 10_000
    ids = tokenizer.encode_batch(lines, num_threads=2)
    assert hugging_face(tmp_path)(lines)["input_ids"] == ids
    assert [tokenizer.decode(row) for row in ids] == lines


def test_runs_of_the_same_piece_merge_in_the_same_order(tmp_path):
    """Small alphabets make ties between merges, where an implementation of BPE shows its habits."""
    pytest.importorskip("transformers")
    for seed, alphabet in enumerate(["ab", "a ", "=-", "ab \n"]):
        rng = random.Random(seed)
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(400)]
        tokenizer = train_tokenizer(texts, tmp_path / "tokenizer.model", 290)
        tokenizer.save(tmp_path, 64)
        other = hugging_face(tmp_path)
        fuzz = ["".join(rng.choices(alphabet, k=rng.randint(1, 80))) for _ in range(300)]
        fuzz += [rng.choice(alphabet) * rng.randint(1, 80) + text for text in fuzz]
        assert other(fuzz)["input_ids"] == tokenizer.encode_batch(fuzz)


@pytest.fixture(scope="module")
def chats(tok, tmp_path_factory):
    """{template: the tokenizer of its folder, as transformers reads it}"""
    folders = {name: tmp_path_factory.mktemp(name) for name in TEMPLATES}
    for name, folder in folders.items():
        tok.save(folder, 512, name)
    return {name: hugging_face(folder) for name, folder in folders.items()}


@templates
def test_apply_chat_template_is_render(tok, chats, template):
    other = chats[template]
    awkward = ["(", "\n\n x \n", "- a\n\n- b", "  def f():\n    return 1", "\u4e2d\t.", "'"]
    awkward.append('"quoted" {{ x }} {% if %}')
    talk = [says(("user", "assistant")[n % 2], content) for n, content in enumerate(awkward)]
    parts = [CONVERSATION[a:b] for a, b in [(0, 5), (1, 5), (0, 1), (1, 2), (2, 3)]]
    for messages in [*parts, talk, talk[::-1]]:
        for prompt in (False, True):
            ids, _ = render(tok, messages, template, add_generation_prompt=prompt)
            options = {"add_generation_prompt": prompt, "return_dict": False}
            assert other.apply_chat_template(messages, tokenize=False, **options) == named(tok, ids)
            assert other.apply_chat_template(messages, tokenize=True, **options) == ids


TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT.filter(str.strip)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(turns=TURNS)
@templates
def test_transformers_renders_and_masks_any_conversation_as_we_do(tok, chats, template, turns):
    messages = [says(role, text.replace("\u2581", "x")) for role, text in turns]
    other = chats[template]
    ids, mask = render(tok, messages, template)
    assert other.apply_chat_template(messages, tokenize=False) == named(tok, ids)
    if not any(SPECIAL.search(message["content"]) for message in messages):  # text to us alone
        theirs = other.apply_chat_template(messages, return_assistant_tokens_mask=True)
        assert (theirs["input_ids"], theirs["assistant_masks"]) == (ids, mask)


# ---- foreign models and folders


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model of Llama's kind: other ids, a space before every text, no pad, no chat markers."""
    folder = tmp_path_factory.mktemp("foreign")
    recipe = {"allow_whitespace_only_pieces": True, "split_digits": True, "vocab_size": 1_000}
    model = sentencepiece_model(topics.values(), **recipe)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


@pytest.fixture
def marked(foreign, tmp_path):
    """That model with the chat markers that a fine-tuner added."""
    folder = shutil.copytree(foreign, tmp_path / "marked")
    added = {"1000": {"content": IM_END}, "1001": {"content": IM_START, "special": False}}
    config = {"added_tokens_decoder": added, "bos_token": "<s>", "pad_token": None}
    config["eos_token"] = {"__type": "AddedToken", "content": IM_END}
    write_json(folder / "tokenizer_config.json", config)
    return folder


def test_a_foreign_model_loads(foreign):
    tokenizer = Tokenizer.load(foreign)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 2)
    assert (tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.template) == (None, None, None)
    texts = ["Hello  there", " led by a space", "\U0001f600"]
    texts += ["x\u2581y", "\u2581y", " \u2581 y", "\u2581\u2581"]  # the first alone has a prefix
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    with pytest.raises(UserError, match="chatml needs"):
        render(tokenizer, CONVERSATION, "chatml")
    assert stop_ids(tokenizer, "instruct") == [2]
    assert template_of(tokenizer) == "instruct"  # which needs no markers


def test_symbols_that_a_folder_adds_are_control_symbols_with_their_roles(foreign, marked):
    plain, tokenizer = Tokenizer.load(foreign), Tokenizer.load(marked)
    assert (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.vocab_size) == (1000, 1001, 1002)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 1000, 1000)
    assert tokenizer.encode(f"a {IM_END} b") == plain.encode(f"a {IM_END} b")  # text stays text
    assert tokenizer.decode([1000, *plain.encode("a")]) == "a"
    for role in ("bos", "eos"):  # a symbol that is not there is not replaced by the model's own
        write_json(marked / "tokenizer_config.json", {f"{role}_token": "lamp"})
        with pytest.raises(UserError, match=f"no control symbol is the {role}_token"):
            Tokenizer.load(marked)


@templates
@pytest.mark.parametrize("size", [1002, 1024])
def test_a_foreign_model_with_markers_and_padding_is_saved_for_transformers(
    marked, tmp_path, template, size
):
    tokenizer = Tokenizer.load(marked)
    tokenizer.match(size, marked)
    tokenizer.save(tmp_path / "saved", 512, template)
    back, other = Tokenizer.load(tmp_path / "saved"), hugging_face(tmp_path / "saved")
    assert (back.pieces, back.eos_id, back.vocab_size) == (tokenizer.pieces, 1000, size)
    assert len(other) == size
    lines = topics["assert"].splitlines()
    assert other(lines)["input_ids"] == tokenizer.encode_batch(lines)
    ids = render(back, PLAIN_TALK, template)[0]
    assert other.apply_chat_template(PLAIN_TALK, return_dict=False) == ids
    for other_size in (size - 1, size + 1):  # ours, and so all there is
        with pytest.raises(UserError, match=f"{other_size} tokens, its tokenizer {size}; they do"):
            back.match(other_size, "folder")
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.load(marked).match(1001, "folder")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"1000": {"content": "lamp", "special": False}}, "adds the word 'lamp'.*move this file"),
        ([1], "damaged"),
        ({"1000": "<a>"}, "damaged"),
        ({"x": {"content": "<a>"}}, "damaged"),
        ({str(10**9): {"content": "<a>"}}, "damaged"),
        ({"1000": {"content": 5}}, "damaged"),
    ],
)
def test_a_word_that_a_folder_adds_and_nonsense_are_refused(foreign, tmp_path, added, message):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added})
    with pytest.raises(UserError, match=message):
        Tokenizer.load(folder)


@pytest.mark.parametrize("adds", [True, False, None])
def test_a_tokenizer_model_begins_as_its_folder_says(foreign, tmp_path, adds):
    folder = shutil.copytree(foreign, tmp_path / "foreign")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {} if adds is None else {"add_bos_token": adds}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "config.json", {"model_type": "llama"})
    tokenizer, other = Tokenizer.load(folder), hugging_face(folder)
    assert other.encode("x")[:-2] == tokenizer.opening == ([1] if adds else [])
    tokenizer.save(tmp_path / "saved", 512)
    back, other = Tokenizer.load(tmp_path / "saved"), hugging_face(tmp_path / "saved")
    assert other.encode("Hello") == back.prompt_ids("Hello") == tokenizer.prompt_ids("Hello")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """A folder as SmolLM's or Llama 3's: byte-level BPE in tokenizer.json, no tokenizer.model."""
    transformers = pytest.importorskip("transformers")
    bpe = byte_level(topics.values(), ["<|endoftext|>", IM_START, IM_END], 900)
    roles = {"bos_token": IM_START, "eos_token": IM_END, "unk_token": "<|endoftext|>"}
    folder = tmp_path_factory.mktemp("smollm")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **roles).save_pretrained(folder)
    return folder


def resaved(folder, tokenizer):
    """Saves a tokenizer and lets transformers save it again: tokenizer.model is then gone."""
    tokenizer.save(folder / "ours", 512, "instruct")
    hugging_face(folder / "ours").save_pretrained(folder / "again")
    assert not (folder / "again" / "tokenizer.model").exists()
    return folder / "again"


def test_a_tokenizer_json_of_ours_alone_gives_the_same_ids(tok, tmp_path):
    tokenizer = Tokenizer.load(resaved(tmp_path, tok))
    assert (tokenizer.template, tokenizer.pieces) == ("instruct", tok.pieces)
    texts = [*topics["assert"].splitlines(), *FRAGMENTS, "", "  a\t\n", f"a {IM_START} b"]
    for text in (text for text in texts if text != "\u2581"):  # to it, a space
        ids = tokenizer.encode(text)
        assert ids == tok.encode(text)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_a_tokenizer_json_with_a_prefix_renders_as_its_tokenizer_model(foreign, tmp_path):
    """Text that follows text gets no space before it, whichever file is read."""
    model = Tokenizer.load(foreign)
    other = Tokenizer.load(resaved(tmp_path, model))
    assert other.dummy_prefix
    assert render(other, PLAIN_TALK, "instruct") == render(model, PLAIN_TALK, "instruct")


@templates
def test_a_tokenizer_json_is_saved_with_a_template(smollm, tmp_path, template):
    tokenizer = Tokenizer.load(smollm)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (1, 2, 2, 0)
    tokenizer.match(960, smollm)
    tokenizer.save(tmp_path, 512, template)
    back, other = Tokenizer.load(tmp_path), hugging_face(tmp_path)
    assert (back.template, back.vocab_size, len(other)) == (template, 960, 960)
    ids = render(back, PLAIN_TALK, template)[0]
    assert other.apply_chat_template(PLAIN_TALK, return_dict=False) == ids


def test_a_tokenizer_json_that_is_not_read_is_one_line(smollm, tmp_path, monkeypatch):
    write_json(tmp_path / "tokenizer.json", {"model": None, "decoder": None})
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizer\.json: needs .*pip install tokenizers"):
        Tokenizer.load(smollm)
