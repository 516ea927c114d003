"""The server as its clients see it: the answers are the engine's alone, in their shapes."""

import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime

import pytest
import torch

import server
from lib.config import UserError, configure
from lib.conversation import TEMPLATES, render, render_prompt, stop_ids
from lib.tokenizer import IM_END
from sample import Reply, Request, Sampling, generate, open_model
from server import ApiError, Call, Handler, Row, Scheduler
from tests import ROOT
from tests.serving import Served, make_model, parse, read_all

CHAT, DONE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "why not"}]
KEY = "correct-horse-battery"
SAMPLING = {"temperature": 1.2, "top_k": 0, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
LONG = {"prompt": "once", "max_tokens": 120, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return make_model(tmp_path_factory.mktemp("served") / "chatty", tiny_tokenizer, "chatml")


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("served") / "plain" / "final"
    return make_model(folder, tiny_tokenizer, initializer_range=0.25)  # other weights


@pytest.fixture(scope="module")
def servers(tmp_path_factory, folder, plain_folder):
    """Servers of several kinds, started side by side."""
    place = tmp_path_factory.mktemp("logs")
    (place / "key").write_text(KEY + "\n")
    origins = "http://page.example:3000/,app://obsidian.md,chrome-extension://abc/"
    foreign = {"allowed_origins": origins, "allowed_hosts": "box.lan:80"}
    servers = {
        "chatty": Served(place / "chatty.log", folder),
        "plain": Served(place / "plain.log", plain_folder),
        "key": Served(place / "key.log", folder, api_key_file=place / "key", host="0.0.0.0"),
        "small": Served(place / "small.log", folder, slots=1, queue=2, model_name="other"),
        "origin": Served(place / "origin.log", folder, **foreign),
    }
    yield servers
    for one in servers.values():
        assert "Traceback" not in one.text
        one.kill()


@pytest.fixture(scope="module")
def chatty(servers):
    """The server that most tests ask."""
    return servers["chatty"].ready()


@pytest.fixture(scope="module")
def model(folder):
    return open_model(folder)[0]


@pytest.fixture(scope="module")
def alone(model, tiny_tokenizer):
    """alone(prompt, count, ...) returns (text, ids, finish reason) of the engine on its own."""

    def alone(prompt, count, template="chatml", model=model, **settings):
        ids = [1, *tiny_tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        ends = stop_ids(tiny_tokenizer, template)
        request = Request(ids, count, Sampling(**settings), ends)
        reply = Reply(tiny_tokenizer)
        text = "".join(reply.push(id) for (id,) in generate(model, [request]) if id is not None)
        return text + reply.push(), request.ids, request.finish

    return alone


@pytest.fixture(scope="module")
def chat_ids(tiny_tokenizer):
    """chat_ids(message, ...) returns the ids of a conversation up to where the answer begins."""
    return lambda *messages: render(
        tiny_tokenizer, list(messages), "chatml", add_generation_prompt=True
    )[0]


# ---- the routes


def test_the_curl_line_of_the_readme_this_descends_from(chatty, alone, chat_ids):
    fields = {"prompt": "Why?", "max_new_tokens": 20, "temperature": 0.7, "template": "chatml"}
    status, answer = chatty.ask("/generate", fields)
    used = answer["generation_config"]
    assert (status, answer["prompt"], used["temperature"]) == (200, "Why?", 0.7)
    assert used["template"] == "chatml"
    prompt = chat_ids({"role": "user", "content": "Why?"})
    text, ids, finish = alone(prompt, 20, temperature=0.7, seed=used["seed"])
    assert (answer["response"], answer["finish_reason"]) == (text.strip(), finish)
    assert answer["usage"]["completion_tokens"] == len(ids)
    *events, last = chatty.stream("/generate", fields | {"seed": used["seed"]})
    assert "".join(event["response"] for event in [*events, last]) == text.strip()
    assert (last["finish_reason"], last["generation_config"]) == (finish, used)


def test_a_stream_is_the_answer_in_pieces(chatty):
    fields = {"messages": HELLO, "max_tokens": 40, "n": 3} | SAMPLING
    _, whole = chatty.ask(CHAT, fields)
    *events, last = chatty.stream(CHAT, fields | {"stream_options": {"include_usage": True}})
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {event["usage"] for event in events} == {None}  # but in the last, as OpenAI's
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        roles = [c["delta"].get("role") for c in mine]
        assert roles == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        reasons = [c["finish_reason"] for c in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3


def test_rows_of_one_request_are_rows_alone(chatty, alone):
    prompts = ["once upon", "the dog", "x" * 30]
    expected = [
        alone(prompt, 12, **(SAMPLING | {"seed": 7 + number}))[0]
        for number, prompt in enumerate(text for text in prompts for _ in range(2))
    ]
    fields = {"prompt": prompts, "n": 2, "max_tokens": 12} | SAMPLING
    _, answer = chatty.ask(DONE, fields)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(chatty, alone):
    full = alone("once", 30, **SAMPLING)[0]
    stop = full[6:9]
    for given in (stop, ["never there", stop]):
        fields = {"prompt": "once", "max_tokens": 30, "stop": given, "logprobs": 0} | SAMPLING
        (choice,) = chatty.ask(DONE, fields)[1]["choices"]
        assert (choice["text"], choice["finish_reason"]) == (full[: full.index(stop)], "stop")
        assert all(start < len(choice["text"]) for start in choice["logprobs"]["text_offset"])


def test_models_and_health(chatty, servers):
    (card,) = chatty.get("/v1/models").json["data"]
    named = {"id": "chatty", "object": "model", "context_length": 128, "template": "chatml"}
    assert named.items() <= card.items()
    assert card["settings"]["temperature"] == {"min": 0, "max": 100, "default": 0.8}
    for name, limits in card["settings"].items():
        for bound in ("min", "max"):  # both are values that may be sent
            fields = {"messages": HELLO, name: limits[bound]}
            fields["max_tokens"] = 1
            assert chatty.ask(CHAT, fields)[0] == 200, (name, bound)
    assert chatty.get("/v1/models/chatty").json == card
    assert chatty.get("/health").json == {"status": "ok", "model": "chatty", "context_length": 128}
    assert servers["plain"].ready().get("/health").json["model"] == "plain"  # final/ says nothing
    assert servers["small"].ready().get("/v1/models/other").status == 200


def test_what_every_answer_carries(chatty, servers):
    answers = [chatty.get(path) for path in ("/health", "/nope", "/v1/models")]
    dates = [parsedate_to_datetime(answer.headers["date"]) for answer in answers]
    assert all(abs(date.timestamp() - time.time()) < 600 for date in dates)
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    prints = {
        one.ask(DONE, {"prompt": "a", "max_tokens": 1})[1]["system_fingerprint"]
        for one in (chatty, servers["origin"].ready(), servers["plain"].ready())
    }
    assert len(prints) == 2  # two of these three serve the same weights
    message = answers[1].json["error"]["message"]
    assert f"base_url={chatty.url}/v1" in message
    assert all(path in message for path in server.ROUTES)


def test_a_prompt_that_leaves_less_than_a_clients_default_is_answered(chatty):
    """256 tokens are LangChain's wish for every completion, 16 OpenAI's: nobody's own."""
    prompt = [1, *[70] * 119]
    for default in ({}, {"max_tokens": 256}, {"max_tokens": -1}):
        _, answer = chatty.ask(DONE, {"prompt": prompt, "temperature": 0} | default)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 128
    for own in ({"max_tokens": 255}, {"prompt": prompt + [70] * 8}):
        status, answer = chatty.ask(DONE, {"prompt": prompt} | own)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        # by these words litellm and others know the error
        assert "This model's maximum context length is 128 tokens" in answer["error"]["message"]


def test_values_of_other_servers(chatty):
    fields = {"prompt": "once", "max_new_tokens": 9}
    greedy = chatty.ask("/generate", fields | {"temperature": 0})[1]["response"]
    assert chatty.ask("/generate", fields | {"top_p": 0, "top_k": -1})[1]["response"] == greedy
    used = [chatty.ask("/generate", fields | {"seed": -1})[1]["generation_config"] for _ in "ab"]
    assert used[0]["seed"] != used[1]["seed"]
    assert min(one["seed"] for one in used) >= 0
    developer, system = (
        chatty.ask("/tokenize", {"messages": [{"role": role, "content": "be"}, *HELLO]})
        for role in ("developer", "system")
    )
    assert developer == system


def test_an_answer_that_was_begun_goes_on(chatty, alone, chat_ids, tiny_tokenizer):
    begun = {"role": "assistant", "content": "once upon "}
    prompt = [*chat_ids(*HELLO), *tiny_tokenizer.encode("once upon")]
    assert chatty.ask("/tokenize", {"messages": [*HELLO, begun]})[1]["tokens"] == prompt
    _, answer = chatty.ask(CHAT, {"messages": [*HELLO, begun], "max_tokens": 12} | SAMPLING)
    text = alone(prompt, 12, **SAMPLING)[0]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_begun_answer_is_the_beginning_of_a_whole_one(tiny_tokenizer, template):
    whole, parts = [{"role": "assistant", "content": "once upon a time"}], []
    for content in ("once upon", "once upon \n", "once upon a"):
        ids = render_prompt(tiny_tokenizer, [*HELLO, whole[0] | {"content": content}], template)
        parts.append(ids)
        assert render(tiny_tokenizer, HELLO + whole, template)[0][: len(ids)] == ids
        assert tiny_tokenizer.decode(ids).endswith(content.strip())
    assert parts[0] == parts[1] != parts[2]


def test_tokenize_and_back(chatty, tiny_tokenizer, chat_ids):
    text = f"the dog {IM_END} caf\u00e9 \U0001f600"
    status, answer = chatty.ask("/tokenize", {"prompt": text, "add_special_tokens": True})
    ids = [1, *tiny_tokenizer.encode(text)]
    assert (status, answer) == (200, {"tokens": ids, "count": len(ids), "max_model_len": 128})
    assert chatty.ask("/tokenize", {"prompt": text})[1]["tokens"] == ids[1:]
    assert chatty.ask("/tokenize", {"prompt": "<s>"})[1]["tokens"] == [1]  # as lm-eval asks
    assert chatty.ask("/detokenize", {"tokens": ids}) == (200, {"prompt": text})
    assert chatty.ask("/detokenize", {"tokens": ids, "model": "gpt-4"})[0] == 404
    assert chatty.ask("/tokenize", {"messages": HELLO})[1]["tokens"] == chat_ids(*HELLO)
    empty = [{"role": "system", "content": ""}], [{"role": "assistant", "content": "\n"}]
    messages = [*empty[0], *HELLO, *empty[1], *HELLO]
    got = chatty.ask("/tokenize", {"messages": messages})[1]["tokens"]
    assert got == chat_ids(*HELLO, *HELLO)
    info = chatty.get("/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", "<pad>")
    env = pytest.importorskip("jinja2").Environment()  # plain: a client's own
    chat = {"messages": HELLO, "add_generation_prompt": True, "bos_token": "<s>"}
    text = env.from_string(info["chat_template"]).render(chat)
    assert text == "<s><|im_start|>user\nwhy not<|im_end|>\n<|im_start|>assistant\n"


def test_a_base_model_continues_what_the_chat_says(servers, plain_folder, tiny_tokenizer, alone):
    plain, base = servers["plain"].ready(), open_model(plain_folder)[0]
    expected = alone("once upon a time", 10, template=None, model=base, **SAMPLING)[0]
    messages = [{"role": "assistant", "content": "once upon"}]
    messages += [{"role": "user", "content": " a time"}]
    _, answer = plain.ask(CHAT, {"messages": messages, "max_tokens": 10} | SAMPLING)
    assert answer["choices"][0]["message"]["content"] == expected
    fields = {"prompt": "once upon a time", "max_new_tokens": 10} | SAMPLING
    assert plain.ask("/generate", fields)[1]["response"] == expected
    parts = [("system", "\n"), ("user", "the"), ("assistant", "\n\n"), ("user", "dog")]
    messages = [{"role": role, "content": text} for role, text in parts]
    ids = plain.ask("/tokenize", {"messages": messages})[1]["tokens"]
    assert ids == [1, *tiny_tokenizer.encode("\nthe\n\ndog")]
    status, answer = plain.ask("/generate", fields | {"template": "chatml"})
    assert (status, answer["error"]["param"]) == (400, "template")
    assert "this model has 'none'" in answer["error"]["message"]
    assert f"{plain_folder} names no chat template: each text is continued" in plain.text


def test_the_chatml_of_an_old_folder_answers_to_both_its_names(tmp_path, tiny_tokenizer):
    folder = make_model(tmp_path / "old", tiny_tokenizer, "chatml_newline")
    server = Served(tmp_path / "log", folder).ready()
    assert "old, template chatml_newline; " in server.text
    for name in ("chatml", "chatml_newline"):
        status, answer = server.ask("/generate", {"prompt": "Why?", "template": name})
        assert (status, answer["generation_config"]["template"]) == (200, "chatml_newline")
    status, answer = server.ask("/generate", {"prompt": "Why?", "template": "chat"})
    assert (status, "'chatml_newline'" in answer["error"]["message"]) == (400, True)
    server.kill()


def test_another_template_than_the_models_own_is_refused(chatty, alone):
    status, answer = chatty.ask("/generate", {"prompt": "Why?", "template": "instruct"})
    assert (status, "'chatml'" in answer["error"]["message"]) == (400, True)
    fields = {"prompt": "once", "template": "none", "max_new_tokens": 9} | SAMPLING
    assert chatty.ask("/generate", fields)[1]["response"] == alone("once", 9, **SAMPLING)[0]


# ---- log-probabilities


@torch.no_grad()
def one_pass(model, ids):
    """The log-probabilities (T, V) of a whole text by one forward pass: the oracle."""
    return model(torch.tensor([ids]))[0].log_softmax(dim=-1)


def test_logprobs_are_the_models(chatty, model, tiny_tokenizer, alone):
    prompt = [1, *tiny_tokenizer.encode("once upon")]
    fields = {"prompt": prompt, "max_tokens": 8, "logprobs": 3, "echo": True} | SAMPLING
    (choice,) = chatty.ask(DONE, fields)[1]["choices"]
    logprobs, ids = choice["logprobs"], prompt + alone(prompt, 8, **SAMPLING)[1]
    truth = one_pass(model, ids)
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    own = truth[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert logprobs["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
    for row, got, mine in zip(truth, logprobs["top_logprobs"][1:], logprobs["token_logprobs"][1:]):
        assert sorted(got.values())[-3:] == pytest.approx(sorted(row.tolist())[-3:], abs=1e-4)
        assert mine in got.values()
    assert choice["text"] == tiny_tokenizer.decode(ids)
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"]):
        rest = choice["text"][start:].lstrip("\ufffd")  # half a character shows with its rest
        assert token.startswith(("<s>", "bytes:")) or rest.startswith(token)


@pytest.mark.parametrize("wanted", [0, 1])
def test_what_lm_eval_asks(chatty, model, tiny_tokenizer, wanted):
    """As many tokens as the prompt and the answer have; greedy is told by equality."""
    row = [1, *tiny_tokenizer.encode("the quick brown fox")]
    fields = {"prompt": [row, row[:4]], "temperature": 0, "max_tokens": wanted, "logprobs": 1}
    answer = chatty.ask(DONE, fields | {"seed": 1234, "echo": True})[1]
    for choice, ids in zip(answer["choices"], (row, row[:4]), strict=True):
        own, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        assert len(choice["logprobs"]["tokens"]) == len(own) == len(ids) + wanted
        assert choice["text"].startswith(tiny_tokenizer.decode(ids))
        assert choice["finish_reason"] == "length"
        greedy = one_pass(model, ids).argmax(dim=-1).tolist()
        is_greedy = [mine == max(top.values()) for mine, top in zip(own[1:], tops[1:])]
        assert is_greedy == [a == b for a, b in zip(greedy, ids[1:])] + [True] * wanted


def ending(alone, prompt):
    """Settings, found by trying, with which an answer of at most 5 tokens ends by itself."""
    tried = ({"temperature": 3.0, "top_k": 0, "top_p": 1.0, "seed": n} for n in range(500))
    answers = ((settings, alone(prompt, 5, **settings)) for settings in tried)
    return next(pair for pair in answers if pair[1][2] == "stop")


def test_the_end_of_an_answer_is_among_its_tokens(chatty, alone):
    settings, (text, ids, _) = ending(alone, "once")
    fields = {"prompt": "once", "max_tokens": 5, "logprobs": 0} | settings
    (choice,) = chatty.ask(DONE, fields)[1]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["logprobs"]["tokens"][-1] in ("</s>", IM_END)
    assert len(choice["logprobs"]["tokens"]) == len(ids) + 1


def test_chat_logprobs(chatty, model, tiny_tokenizer, alone, chat_ids):
    fields = {"messages": HELLO, "max_tokens": 12, "logprobs": True, "top_logprobs": 5} | SAMPLING
    (choice,) = chatty.ask(CHAT, fields)[1]["choices"]
    content, prompt = choice["logprobs"]["content"], chat_ids(*HELLO)
    ids = alone(prompt, 12, **SAMPLING)[1]
    for entry, id, row in zip(content, ids, one_pass(model, prompt + ids)[len(prompt) - 1 :]):
        spelled = bytes(entry["bytes"]).decode("utf-8", "replace")
        assert spelled == entry["token"] == tiny_tokenizer.decode([id])
        assert entry["logprob"] == pytest.approx(row[id].item(), abs=1e-4)
        others = [other["logprob"] for other in entry["top_logprobs"]]
        assert others == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
    assert text.strip() == choice["message"]["content"]
    streamed = [e["choices"][0]["logprobs"]["content"] for e in chatty.stream(CHAT, fields)]
    assert list(itertools.chain(*streamed)) == content


def test_the_end_of_a_chats_turn_stands_beside_its_tokens(chatty, model, alone, chat_ids):
    prompt = chat_ids(*HELLO)
    settings, (_, ids, _) = ending(alone, prompt)
    fields = {"messages": HELLO, "max_tokens": 5, "logprobs": True, "top_logprobs": 2} | settings
    *_, last = chatty.stream(CHAT, fields)
    end = last["choices"][0]["logprobs"]["end"]
    assert end["token"] in ("</s>", IM_END)
    row = one_pass(model, prompt + ids)[-1]
    tops = [top["logprob"] for top in end["top_logprobs"]]
    assert tops == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert any(end["logprob"] == pytest.approx(value, abs=1e-4) for value in row.tolist())
    (cut,) = chatty.ask(CHAT, fields | {"max_tokens": max(1, len(ids))})[1]["choices"]
    assert "end" not in cut["logprobs"] or cut["finish_reason"] == "stop"


# ---- penalties and biases


@torch.no_grad()
def greedy(model, prompt, count, frequency=0, presence=0):
    """The greedy answer of ids with a text, by the formula of OpenAI's documentation."""
    ids = []
    while len(ids) < count:
        logits = model(torch.tensor([[*prompt, *ids]]))[0, -1]
        for id in set(ids):
            logits[id] -= ids.count(id) * frequency + float(ids.count(id) > 0) * presence
        ids.append(logits[6:].argmax().item() + 6)
    return ids


@pytest.mark.parametrize(("frequency", "presence"), [(2, 0), (0, 2), (1.5, -0.5), (-2, -2)])
def test_penalties_count_the_tokens_of_the_answer(
    chatty, model, tiny_tokenizer, frequency, presence
):
    prompt = [1, 70, 71, 70]
    never_ends = {"temperature": 0, "max_tokens": 40, "logit_bias": {"2": -100, "5": -100}}
    asked = never_ends | {"frequency_penalty": frequency, "presence_penalty": presence}
    answers = greedy(model, prompt, 40, frequency, presence), greedy(model, prompt, 40)
    expected = list(map(tiny_tokenizer.decode, answers))
    assert expected[0] != expected[1]
    choices = chatty.ask(DONE, asked | {"prompt": [prompt, prompt]})[1]["choices"]
    assert [choice["text"] for choice in choices] == [expected[0]] * 2
    with ThreadPoolExecutor(2) as pool:  # each is as alone
        ask = lambda fields: chatty.ask(DONE, fields | {"prompt": prompt})[1]["choices"][0]["text"]
        assert list(pool.map(ask, (asked, never_ends))) == expected


def test_a_logit_bias_forces_and_forbids(chatty):
    def ask(bias):
        fields = {"messages": HELLO, "max_tokens": 5, "temperature": 0, "logit_bias": bias}
        (choice,) = chatty.ask(CHAT, fields | {"logprobs": True})[1]["choices"]
        ids = [entry["bytes"] for entry in choice["logprobs"]["content"]]
        return choice["message"]["content"], choice["finish_reason"], ids

    assert ask({"103": 100}) == ("aaaaa", "length", [[97]] * 5)
    assert ask({"2": 100}) == ask({"5": 100}) == ("", "stop", [])
    assert ask({str(id): -100 for id in range(384) if id != 104}) == ("bbbbb", "length", [[98]] * 5)


# ---- answers of a form

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["caf\u00e9", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = [PERSON, {"enum": ["yes", "no", 7]}, {"type": "array", "items": {"type": "boolean"}}]


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_answers_fit_their_schema(chatty, schema, temperature):
    """Of a model of random weights, each that ends by itself, streamed or not."""
    pytest.importorskip("llguidance")
    jsonschema = pytest.importorskip("jsonschema")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    fields = {"messages": HELLO, "temperature": temperature, "top_k": 0, "top_p": 1, "seed": 1}
    fields |= {"response_format": form, "n": 8}
    choices = chatty.ask(CHAT, fields)[1]["choices"]
    answers = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert len(answers) >= 4
    for text in answers:
        jsonschema.validate(json.loads(text), schema)
    streamed = [""] * 8
    for event in chatty.stream(CHAT, fields):
        (choice,) = event["choices"]
        streamed[choice["index"]] += choice["delta"]["content"]
    assert streamed == [choice["message"]["content"] for choice in choices]


def test_a_form_changes_no_row_beside_it(chatty):
    pytest.importorskip("llguidance")
    plain = {"prompt": "once", "max_tokens": 60} | SAMPLING
    form = plain | {"response_format": {"type": "json_object"}, "logit_bias": {"97": -100}}
    alone = [chatty.ask(DONE, fields)[1]["choices"][0] for fields in (plain, form)]
    assert alone[1]["text"].startswith("{")
    assert alone[1]["finish_reason"] == "length" or isinstance(json.loads(alone[1]["text"]), dict)
    with ThreadPoolExecutor(6) as pool:
        asked = [plain, form] * 3
        answers = list(pool.map(lambda fields: chatty.ask(DONE, fields)[1]["choices"][0], asked))
    assert answers == alone * 3


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#/nowhere"}, "/nowhere"),
        ({"$ref": "#"}, "NoExtension"),  # seen at the first token only
        ({"type": "string", "minLength": 10**30}, "minLength"),
        ({"not": {}}, "Unimplemented"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_kept_is_a_400(chatty, schema, problem, stream):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    fields = {"messages": HELLO, "max_tokens": 5, "stream": stream, "response_format": form}
    status, answer = chatty.ask(CHAT, fields)
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert problem in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_without_llguidance_a_form_is_refused_by_name(model, tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    api = server.Api(Scheduler(model, 1, 1), tiny_tokenizer, "m", 60)
    fields = {"messages": HELLO, "response_format": {"type": "json_object"}}
    with pytest.raises(UserError, match=r"response_format.*; pip install llguidance"):
        api.chat(fields, None)


# ---- many at once


def test_a_crowd_gets_what_each_would_get_alone(chatty):
    """200 clients at once, greedy or drawn: 200 or 429, the solo answer."""
    kinds = [{"temperature": 0}, {"temperature": 1.5, "seed": 3}]
    kinds += [{"repetition_penalty": 1.3, "seed": 7}]
    asked = [  # top_k: of many almost alike, rounding could draw another
        {"prompt": f"once upon {i % 10}", "max_tokens": 8 + i % 20, "top_k": 8} | kind
        for i, kind in zip(range(200), itertools.cycle(kinds))
    ]

    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda fields: chatty.raw(chatty.post(DONE, fields)), asked))
    assert {response.status for response in results} <= {200, 429}
    solo = {}
    for fields, response in zip(asked, results):
        if response.status == 429:
            assert response.headers["retry-after"] == "1"
            assert response.json["error"]["code"] == "queue_full"
            continue
        key = json.dumps(fields)
        solo[key] = solo.get(key) or chatty.ask(DONE, fields)[1]["choices"][0]["text"]
        assert response.json["choices"][0]["text"] == solo[key]
    assert sum(response.status == 200 for response in results) >= 64


class Solo:
    """A scheduler in this process, with rows whose client leaves, or fails, at an exact moment."""

    def __init__(self, model, tokenizer, slots=2, queue=8):
        self.scheduler, self.tokenizer = Scheduler(model, slots, queue), tokenizer
        self.thread = threading.Thread(target=self.scheduler.run, daemon=True)
        self.thread.start()

    def close(self):
        self.scheduler.close()
        self.thread.join()

    def call(self, prompts=((1, 70),), count=60, disconnected=lambda: False, seconds=60, **kw):
        call = Call(disconnected, time.monotonic() + seconds)
        for prompt in prompts:
            request = list(prompt), count, Sampling(temperature=0), (2,)
            call.rows.append(Row(call, Reply(self.tokenizer), *request, **kw))
        self.scheduler.submit(call)
        return call


@pytest.fixture
def solo(model, tiny_tokenizer):
    one = Solo(model, tiny_tokenizer)
    yield one
    one.close()


@contextlib.contextmanager
def refused(status):
    with pytest.raises(ApiError) as problem:
        yield problem
    assert problem.value.status == status


def finishes(call):
    return [piece.finish for piece in call.pieces()]


def test_generation_stops_with_the_client(solo):
    for tokens in (0, 1, 7):
        row = None
        call = solo.call(disconnected=lambda n=tokens: row is not None and len(row.ids) >= n)  # noqa: B023
        row = call.rows[0]
        assert finishes(call) == ["disconnected"]
        assert tokens <= len(row.ids) <= tokens + 1


def test_a_call_enters_whole_or_not_at_all(solo):
    calls = [solo.call(prompts=[(1, 70)] * 4, count=9) for _ in range(2)]
    with refused(429):
        solo.call(prompts=[(1, 70)] * 11)
    assert [len(finishes(call)) for call in calls] == [4, 4]


def test_a_row_ends_with_its_time_and_one_that_waited_too_long_is_refused(solo):
    def expire():
        if call and len(call.rows[0].ids) >= 3:
            call.deadline = 0

    call = None
    call = solo.call(count=120, disconnected=expire)
    assert finishes(call) == ["time"]
    blocked = [solo.call(count=120) for _ in range(2)]
    late = solo.call(seconds=-1)
    with refused(429):
        finishes(late)
    assert [finishes(call) for call in blocked] == [["length"], ["length"]]


def test_stopping_ends_what_runs_and_refuses_what_waits(solo):
    submitted = threading.Event()

    def stop():
        submitted.wait()
        if all(call.rows[0].ids for call in running):
            solo.scheduler.close()

    running = [solo.call(count=120, disconnected=stop), solo.call(count=120)]
    waiting = solo.call()
    submitted.set()
    assert [finishes(call) for call in running] == [["shutdown"]] * 2
    with refused(503):
        finishes(waiting)
    solo.thread.join()
    with refused(503):
        solo.call()


@pytest.fixture
def fragile(model, tiny_tokenizer):
    """A scheduler whose model breaks on one id, 99, in a prompt or in a score."""

    def breaks(module, args):
        if (args[0] == 99).any():
            raise RuntimeError("a broken kernel")

    handle = model.model.register_forward_pre_hook(breaks)
    solo = Solo(model, tiny_tokenizer)
    yield solo
    handle.remove()
    solo.close()


def test_a_failure_ends_its_own_calls_only(fragile):
    expected = finishes(fragile.call())
    for prompt in ((1, 99, 70), (1, 70, 99)):
        with pytest.raises(RuntimeError, match="a broken kernel"):
            finishes(fragile.call(prompts=[prompt]))
        assert finishes(fragile.call()) == expected  # the next call is served as ever


@pytest.mark.parametrize("streaming", [False, True])
def test_a_failure_is_a_number_to_its_client_and_a_traceback_in_the_log(capfd, streaming):
    handler, sent = Handler.__new__(Handler), []
    handler.answer, handler.streaming, handler.wfile = (lambda: 1 / 0), streaming, io.BytesIO()
    handler.request_id = "req_7"
    handler.send = lambda status, answer, headers: sent.append((status, json.dumps(answer)))
    handler.respond()
    text = handler.wfile.getvalue().decode()
    ((status, answer),) = sent or [(500, text.removeprefix("data: "))]
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["code"]) == (500, "server_error", "internal")
    assert error["message"].startswith("internal error req_7:")
    assert "error req_7: Traceback" in capfd.readouterr().err


# ---- who may ask


WRONG_KEYS = ["Bearer wrong", f"Bearer {KEY[:-1]}", f"Bearer \xe9{KEY[1:]}", f"Basic {KEY}", KEY]


@pytest.mark.parametrize(
    ("headers", "status"),
    [([], 401), ([f"X-API-Key: {KEY}"], 401)]
    + [([f"Authorization: {words}"], 401) for words in WRONG_KEYS]
    + [([f"authorization:bearer {KEY}"], 200)],
)
def test_nothing_but_the_right_key_opens(servers, headers, status):
    one = servers["key"].ready()
    assert one.get("/v1/models", *headers).status == status
    assert one.raw(one.post("/tokenize", {"prompt": "a"}, *headers)).status == status
    assert one.raw(one.post("/nope", b"{}")).status == 404
    assert KEY not in one.text


def test_what_is_open_without_a_key(servers):
    one = servers["key"].ready()
    assert one.get("/health").status == one.get("/").status == 200  # the page asks for the key
    for path in ("/metrics", "/tokenizer_info", f"/v1/models?key={KEY}"):
        answer = one.get(path)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    head = one.head("GET /health HTTP/1.1")
    for host, status in ((b"192.168.7.7", 200), (b"box.lan", 403)):  # an address is nobody's name
        assert one.raw(head.replace(b"127.0.0.1", host)).status == status


def test_of_others_pages_only_the_allowed_may_ask(servers):
    one, origin = servers["origin"].ready(), "Origin: http://page.example:3000"
    answer = one.raw(one.post("/tokenize", {"prompt": "a"}, origin))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin[8:])
    wanted = "authorization, content-type, x-stainless-lang, x-stainless-os"  # as openai-node's
    asked = f"Access-Control-Request-Headers: {wanted}"
    for allowed in (origin, "Origin: app://obsidian.md", "Origin: chrome-extension://abc"):
        preflight = one.raw(one.head(f"OPTIONS {CHAT} HTTP/1.1", allowed, asked))
        assert (preflight.status, preflight.body) == (200, b"")
        assert preflight.headers["access-control-allow-headers"] == wanted
        assert preflight.headers["access-control-allow-origin"] == allowed[8:]
    foreign = one.raw(one.head(f"OPTIONS {CHAT} HTTP/1.1", origin + "0"))
    assert foreign.status == 403
    assert not any(name.startswith("access-control") for name in foreign.headers)
    assert "access-control-allow-origin" not in one.get("/health").headers
    assert one.raw(one.head("GET /health HTTP/1.1").replace(b"127.0.0.1", b"BOX.lan")).status == 200


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--host=no.such.host.invalid", "--api_key_file=KEY"], "invalid.*choose an address"),
        (["--host=203.0.113.5", "--api_key_file=KEY"], "203.0.113.5.*cannot listen"),
        (["--port=TAKEN"], "cannot listen.*--port=0"),
        (["--api_key_file=SHORT"], "SHORT: a key is 8 to 200"),
        (["--api_key_file=nowhere"], "nowhere: cannot be read"),
        ([], "MINI_LLM_API_KEY: a key is 8 to 200"),
        (["--model_path=nowhere"], "nowhere: no such folder"),
        (["--slots=0"], r"slots.*1\.\.256"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, chatty, folder, words, problem):
    monkeypatch.chdir(tmp_path)
    for name, text in (("KEY", KEY), ("SHORT", "abc")):
        (tmp_path / name).write_text(text)
    if not words:
        monkeypatch.setenv("MINI_LLM_API_KEY", "")
    words = [word.replace("TAKEN", str(chatty.port)) for word in words]
    model = [] if any("model_path" in word for word in words) else [f"--model_path={folder}"]
    port = [] if any("port" in word for word in words) else ["--port=0"]
    with pytest.raises(UserError, match=problem) as error:
        server.main(configure(server.ServerConfig, [*model, *port, *words]))
    assert "\n" not in str(error.value)


# ---- life and death


def test_the_command(folder):
    """`python server.py`: one line, a request by curl where it exists, an end that is asked for."""
    words = [sys.executable, str(ROOT / "server.py"), f"--model_path={folder}", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | {"MINI_LLM_API_KEY": KEY}
    with subprocess.Popen(words, env=env, **pipes) as process:
        line = process.stdout.readline()
        parts = r"chatty, template chatml; float32 on cpu, context 128, 8 slots"
        url = re.fullmatch(rf"(http://127\.0\.0\.1:\d+)  {parts}\n", line)[1]
        if shutil.which("curl"):
            headers = ["Content-Type: application/json", f"Authorization: Bearer {KEY}"]
            ask = ["curl", "-s", "-X", "POST", f"{url}/generate", "-H", headers[0], "-H"]
            ask += [headers[1], "-d", json.dumps({"prompt": "Why?", "max_new_tokens": 3})]
            done = subprocess.run(ask, capture_output=True, check=True, timeout=60)
            assert {"response", "prompt", "generation_config"} <= json.loads(done.stdout).keys()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert KEY not in err
    assert "Why" not in err


def test_streams_end_properly_when_the_server_stops(tmp_path, tiny_tokenizer):
    long = make_model(tmp_path / "long", tiny_tokenizer, sequence_length=4096)
    one = Served(tmp_path / "log", long, slots=4).ready()
    ask = one.post(DONE, LONG | {"max_tokens": 4000, "stream": True})
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(one.connect(ask)) for _ in range(4)]
        begun = [sock.recv(1 << 16) for sock in served]
        waits = [stack.enter_context(one.connect(ask)) for _ in range(20)]  # some not accepted yet
        one.signal(signal.SIGINT)
        texts = [part.decode() + read_all(sock).decode() for part, sock in zip(begun, served)]
        answers = [parse(read_all(sock)) for sock in waits]
    for text in texts:
        *_, last, done, nothing = text.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "shutdown"
    codes = {(answer.status, answer.json["error"]["code"]) for answer in answers}
    assert codes == {(503, "stopping")}
    assert one.wait() == [0]


# ---- what it tells of itself


def test_a_log_that_nobody_reads_holds_nobody_up():
    code = "import server; h = server.Handler.__new__(server.Handler); h.client_address = 'me', 1"
    code += "\nfor _ in range(9000): h.log_message('%s', 'x' * 99)"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.wait(60) == 0


def test_the_page_uses_nothing_of_others_and_makes_no_markup(chatty):
    page = chatty.get("/")
    text, policy = page.body.decode(), page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")  # nothing from, and nothing to, elsewhere
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        block = re.search(f"(?s)<{tag}>(.*?)</{tag}>", text)[1]
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    loose = r"innerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
    assert not re.search(loose + r"|https?://(?!www\.w3)", text)
    markup = re.sub(r"(?s)<(script|style)>.*?</\1>", "", text)
    assert not re.search(r"\s(on\w+|style|srcdoc)\s*=", markup)
    assert page.body == (ROOT / "web" / "chat.html").read_bytes()


def test_metrics_are_prometheus(chatty):
    parser = pytest.importorskip("prometheus_client.parser")

    def values():
        text = chatty.get("/metrics").body.decode()
        families = parser.text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples]
        return {(s.name, *sorted(s.labels.items())): s.value for s in samples}

    before = values()
    chatty.ask(DONE, {"prompt": [1, 70, 71], "max_tokens": 5, "n": 2, "temperature": 0})
    chatty.ask(DONE, {"prompt": []})
    more = {key: value - before.get(key, 0) for key, value in values().items()}
    requests = {(key[1][1], key[2][1]): more[key] for key in more if len(key) == 3}
    assert requests[DONE, "200"] == requests[DONE, "400"] == requests["/metrics", "200"] == 1
    assert more["mini_llm_tokens_total", ("kind", "prompt")] == 6
    assert 2 <= more["mini_llm_tokens_total", ("kind", "new")] <= 10
    assert more["mini_llm_queue_length",] == more["mini_llm_batch_size",] == 0


def test_the_log_is_short_and_holds_no_contents(chatty):
    chatty.ask("/generate", {"prompt": "a secret of mine", "max_new_tokens": 1})
    chatty.get("/" + "x" * 500)
    chatty.ask("/generate", {"prompt": "a secret of mine", "secret": "secret"})
    chatty.raw(chatty.post("/generate", b'{"secret": 1, "secret": 2}'))
    chatty.raw(b"\x16\x03\x01 secret\r\n\r\n")
    assert "secret" not in chatty.text
    pattern = r"127\.0\.0\.1 - - \[.*?\] (\w+ \S+|- ) \d{3} \d+\.\d{3} s"
    lines = chatty.text[chatty.text.index("http://") :].splitlines()[1:]
    assert [line for line in lines if not re.fullmatch(pattern, line)] == []
    assert max(map(len, lines)) < 160


# ---- clients


def test_the_openai_package(chatty, alone, chat_ids):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{chatty.url}/v1", api_key="unused", max_retries=0)
    assert [card.id for card in client.models.list()] == ["chatty"]
    assert client.models.retrieve("chatty").id == "chatty"
    text, ids, _ = alone(chat_ids(*HELLO), 20, temperature=0.9, seed=5)
    asked = {"model": "chatty", "messages": HELLO, "temperature": 0.9, "seed": 5}
    chat, completions = client.chat.completions, client.completions
    answer = chat.create(**asked, max_tokens=20, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == text.strip()
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == len(ids)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chat.create(**asked, max_completion_tokens=20, **stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text.strip()
    assert last.usage == answer.usage
    with pytest.raises(openai.LengthFinishReasonError) as end:
        chat.stream(**asked, max_tokens=20).__enter__().get_final_completion()
    message = end.value.completion.choices[0].message
    assert (message.role, message.content) == ("assistant", text.strip())
    scored = completions.create(model="chatty", prompt="once", echo=True, logprobs=2, max_tokens=1)
    assert scored.choices[0].text.startswith("once")
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(openai.NotFoundError, match="not served here"):
        completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="128 tokens") as problem:
        completions.create(model="chatty", prompt="a", max_tokens=500)
    assert (problem.value.code, problem.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        chat.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
