"""Clients that no one here wrote, against a running server: lm-eval and litellm."""

import pytest
import torch

from lib.conversation import stop_ids
from sample import Reply, Request, Sampling, generate, open_model
from tests.serving import Served, make_model

HELLO = [{"role": "user", "content": "why not"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    return make_model(tmp_path_factory.mktemp("served") / "chatty", tiny_tokenizer, "chatml")


@pytest.fixture(scope="module")
def chatty(folder):
    one = Served(folder.with_suffix(".log"), folder).ready()
    yield one
    assert "Traceback" not in one.text
    one.kill()


@pytest.fixture(scope="module")
def lm_eval(chatty):
    """lm-eval's client with the settings of docs/REFERENCE.md, and its requests."""
    pytest.importorskip("tenacity")  # which lm_eval[api] brings
    completions = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    url = f"{chatty.url}/v1/completions"
    settings = {"tokenizer_backend": "remote", "max_length": 128}
    client = completions(base_url=url, model="chatty", batch_size=2, **settings)

    def ask(kind, *questions):
        asked = [instance(kind, {}, question, n) for n, question in enumerate(questions)]
        return getattr(client, kind)(asked)

    return ask


@torch.no_grad()
def scores(model, ids, first):
    """Returns (the log-probability of ids[first:], whether each is the likeliest)."""
    rows = model(torch.tensor([ids]))[0, first - 1 : -1].log_softmax(dim=-1)
    answer = torch.tensor(ids[first:])
    greedy = bool((rows.argmax(dim=-1) == answer).all())
    return rows.gather(1, answer[:, None]).sum().item(), greedy


def test_lm_eval_scores_as_one_forward_pass_does(lm_eval, folder, tiny_tokenizer):
    model, encode = open_model(folder)[0], tiny_tokenizer.encode
    pairs = [("once upon", " a time"), ("the quick brown", " fox"), ("why", " not!")]
    likely = model(torch.tensor([encode("once")]))[0, -1].argmax().item()
    pairs.append(("once", tiny_tokenizer.decode([likely])))
    for pair, (logprob, greedy) in zip(pairs, lm_eval("loglikelihood", *pairs), strict=True):
        ids = encode("".join(pair))
        expected = scores(model, ids, len(encode(pair[0])))
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]
    text = "once upon a time there was one who asked: why not!"
    (logprob,) = lm_eval("loglikelihood_rolling", (text,))
    assert logprob == pytest.approx(scores(model, [1, *encode(text)], 1)[0], abs=1e-3)


def test_lm_eval_generates_as_the_engine_does(lm_eval, folder, tiny_tokenizer):
    request = Request(tiny_tokenizer.encode("once upon"), 24, Sampling(temperature=0))
    request.stop_ids = stop_ids(tiny_tokenizer, "chatml")
    reply = Reply(tiny_tokenizer)
    steps = generate(open_model(folder)[0], [request])
    text = "".join(reply.push(id) for (id,) in steps if id is not None) + reply.push()
    stop = text[7:9]
    for until, expected in ((["never"], text), ([stop], text[: text.index(stop)])):
        wanted = {"until": until, "max_gen_toks": 24, "do_sample": False}
        assert lm_eval("generate_until", ("once upon", wanted)) == [expected]


def test_litellm(chatty, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network
    litellm = pytest.importorskip("litellm")
    server = {"api_base": f"{chatty.url}/v1", "api_key": "none", "max_retries": 0}
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    right = chatty.ask("/v1/chat/completions", asked)[1]["choices"][0]
    chat = server | asked | {"model": "openai/chatty"}
    (choice,) = litellm.completion(**chat).choices
    assert choice.message.content == right["message"]["content"]
    assert choice.finish_reason == right["finish_reason"]
    chunks = litellm.completion(**chat, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == right["message"]["content"]
    asked = {"prompt": "once", "temperature": 0, "max_tokens": 256}
    right = chatty.ask("/v1/completions", asked)[1]["choices"][0]["text"]
    answer = litellm.text_completion(**server | asked, model="text-completion-openai/chatty")
    assert answer.choices[0].text == right
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**chat | {"max_tokens": 500})
