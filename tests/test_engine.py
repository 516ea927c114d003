"""engine.py: neither cache nor neighbours change a token, the rules are transformers', the text is whole."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sample as engine_room
from lib.config import UserError
from model import Llama, ModelConfig, save_model
from sample import (
    Engine,
    Reply,
    Request,
    Rules,
    Sampling,
    draw,
    generate,
    keep,
    open_model,
    pack,
    pick,
    token_logprobs,
    uniforms,
)

BASE = ModelConfig(
    n_layer=2,
    d_model=32,
    n_head=4,
    num_key_value_heads=2,
    d_ff=64,
    vocab_size=384,
    sequence_length=48,
    initializer_range=0.3,  # lively: near-ties between tokens would test rounding, not us
)
GREEDY = Sampling(temperature=0)
EVERY_RULE = Sampling(
    temperature=1.5, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=7
)
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=3)
CROWD = [
    GREEDY,
    EVERY_RULE,
    PLAIN,
    replace(PLAIN, top_p=0.7),
    replace(PLAIN, min_p=0.1, seed=2**64 - 1),
    replace(GREEDY, repetition_penalty=2.0),
    replace(EVERY_RULE, seed=8),
    Sampling(seed=0),
]
PROMPTS = [
    [1] + [(7 * row + 3 * i) % 384 for i in range(length)]
    for row, length in enumerate([0, 6, 3, 11, 6, 1, 20, 2])
]


def build(cfg=BASE):
    torch.manual_seed(0)
    return Llama(cfg).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def answer(model, prompt, sampling=GREEDY, count=10, engine=None, **kw):
    """The ids of one request alone."""
    request = Request(list(prompt), count, sampling, **kw)
    for _ in generate(model, [request], engine):
        pass
    return request.ids


@torch.no_grad()
def uncached(model, prompt, sampling, count=10):
    """The oracle: the whole text through the model for every token."""
    rules, ids, chance = (
        Rules([sampling], model.cfg.vocab_size),
        list(prompt),
        uniforms(sampling.seed, count),
    )
    for step in range(count):
        logits = model(torch.tensor([ids]))[:, -1]
        ids.append(pick(logits, rules, torch.tensor([ids]), chance[step].view(1, 1)).item())
    return ids[len(prompt) :]


# ---- the cache


@pytest.mark.parametrize(
    "sampling", [GREEDY, EVERY_RULE, PLAIN], ids=["greedy", "every-rule", "plain"]
)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(
    ("tied", "kv_heads", "backend"),
    [(True, 4, "sdpa"), (False, 2, "sdpa"), (True, 1, "math"), (False, 4, "math")],
)
def test_cached_equals_uncached(sampling, length, tied, kv_heads, backend):
    model = build(replace(BASE, tie_word_embeddings=tied, num_key_value_heads=kv_heads))
    model.use_attention(backend)
    prompt = PROMPTS[3][:length]
    assert answer(model, prompt, sampling) == uncached(model, prompt, sampling)


# ---- neighbours


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "static-shapes"])
def test_a_row_in_a_crowd_equals_the_row_alone(model, graphs):
    crowd = [Request(prompt, 14, sampling) for prompt, sampling in zip(PROMPTS, CROWD)]
    steps = list(generate(model, crowd, Engine(model, len(crowd), graphs=graphs)))
    assert all(len(step) == len(crowd) for step in steps)
    for row, request in enumerate(crowd):
        assert request.ids == answer(model, request.prompt, request.sampling, 14)
        assert request.ids == [step[row] for step in steps if step[row] is not None]


@pytest.mark.parametrize("sampling", [GREEDY, EVERY_RULE])
def test_samples_of_one_prompt_are_rows_of_their_own(model, sampling):
    seeds = [sampling.seed and sampling.seed + i for i in range(3)]
    rows = [Request(PROMPTS[1], 10, replace(sampling, seed=seed)) for seed in seeds]
    list(generate(model, rows))
    assert [row.ids for row in rows] == [answer(model, PROMPTS[1], row.sampling) for row in rows]


@pytest.mark.parametrize("graphs", [False, True])
def test_requests_join_while_others_are_under_way(model, graphs):
    first, second, third = (Request(PROMPTS[i], 9, CROWD[i]) for i in (3, 1, 6))
    engine = Engine(model, 2, graphs=graphs)
    assert engine.join([first]) == [0]
    for _ in range(4):
        list(engine.advance())
    assert engine.join([second]) == [1]
    while first.finish is None:
        list(engine.advance())
    assert engine.join([third]) == [0]
    while second.finish is None or third.finish is None:
        list(engine.advance())
    for request in (first, second, third):
        assert request.ids == answer(model, request.prompt, request.sampling, 9)


def finish_all(engine, rows):
    while any(row.finish is None for row in rows):
        list(engine.advance())


@pytest.mark.parametrize("graphs", [False, True], ids=["plain", "static-shapes"])
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_crowd_of_16_that_comes_and_goes(model, graphs, chunk):
    rng = random.Random(chunk + graphs)
    waiting = [
        Request([1, *rng.choices(range(384), k=rng.randint(0, 30))], rng.randint(1, 16), sampling)
        for sampling in CROWD * 4
    ]
    rows, engine = list(waiting), Engine(model, 16, graphs=graphs, chunk=chunk)
    assert engine.free == 16
    while waiting or any(row.finish is None for row in rows):
        count = rng.randint(0, min(engine.free, len(waiting), 5))
        engine.join([waiting.pop() for _ in range(count)])
        list(engine.advance())
    assert engine.free == 16
    for row in rows:
        assert row.ids == answer(model, row.prompt, row.sampling, row.max_new_tokens)


def test_a_long_prompt_does_not_hold_up_the_others(model):
    short, long = Request([1], 30, PLAIN), Request(PROMPTS[6] * 2, 5, PLAIN)
    engine = Engine(model, 2, chunk=8)
    engine.join([short])
    list(engine.advance())
    engine.join([long])
    for turn in range(1, 7):  # 41 positions are 6 turns' work; the last prepares the first token
        (ids,) = engine.advance()
        assert (len(short.ids), ids[1] is None) == (turn + 1, turn < 6)
    finish_all(engine, [short, long])
    assert long.ids == answer(model, long.prompt, long.sampling, 5)


def test_rows_that_wait_or_write_are_cancelled(model):
    engine = Engine(model, 3, chunk=4)
    rows = [Request(PROMPTS[6], 9), Request(PROMPTS[6], 9, GREEDY), Request(PROMPTS[1], 9, GREEDY)]
    engine.join(rows)
    list(engine.advance())
    rows[0].finish = "cancelled"
    assert engine.free == 1
    late = Request(PROMPTS[3], 9, GREEDY)
    assert engine.join([late]) == [0]
    finish_all(engine, [*rows, late])
    assert rows[0].ids == []
    for row in (*rows[1:], late):
        assert row.ids == answer(model, row.prompt, GREEDY, 9)


@pytest.mark.parametrize("prompt", [[999, 1, 1], [1, 1, 999]], ids=["prefilling", "decoding"])
def test_a_failure_leaves_no_slot_behind(model, prompt):
    engine = Engine(model, 2)
    with pytest.raises(UserError, match="leave no room"):
        engine.join([Request([1], 5), Request([1] * 48, 5)])
    assert engine.free == 2
    bad = Request(prompt, 5)
    engine.join([bad])
    with pytest.raises(IndexError):
        list(engine.advance())
    assert (bad.finish, engine.free) == ("error", 2)
    good = [Request(PROMPTS[1], 9, GREEDY), Request(PROMPTS[3], 9, EVERY_RULE)]
    list(generate(model, good, engine))
    for row in good:
        assert row.ids == answer(model, row.prompt, row.sampling, 9)


def test_an_engine_is_used_again(model):
    engine = Engine(model, 1)
    for prompt, sampling in zip(PROMPTS, CROWD):
        assert answer(model, prompt, sampling, engine=engine) == answer(model, prompt, sampling)


@pytest.mark.parametrize(("limit", "window"), [(1, 256), (256, 256), (257, 512), (1025, 2048)])
def test_windows_double(limit, window):
    assert engine_room.window_for(limit) == window


def test_static_shapes_cross_a_window():
    model = build(replace(BASE, n_layer=1, sequence_length=300))
    prompt = (PROMPTS[6] * 20)[:250]
    engine = Engine(model, 1, graphs=True)
    assert answer(model, prompt, EVERY_RULE, 40, engine) == answer(model, prompt, EVERY_RULE, 40)
    assert engine.cache.window == 512


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("arranged", [lambda model: model, pack])
def test_cuda_graphs_change_nothing(arranged):
    model = arranged(
        build(replace(BASE, n_layer=2, d_model=128, d_ff=256, sequence_length=600)).cuda()
    )
    prompts = [
        (PROMPTS[6] * 13)[: 230 + 3 * row] for row in range(8)
    ]  # the window of 256 is left on the way
    for sampling in (GREEDY, EVERY_RULE, PLAIN):
        rows, same = ([Request(prompt, 40, sampling) for prompt in prompts] for _ in range(2))
        list(generate(model, rows, Engine(model, len(rows), graphs=True)))
        list(generate(model, same))
        assert [row.ids for row in rows] == [row.ids for row in same]


# ---- the rules


def distribution(logits, **settings):
    """The probabilities (V,) that `keep` leaves of one row of logits."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    logits = torch.as_tensor(logits, dtype=torch.float32)[None]
    weights, ids = keep(logits, Rules([Sampling(**off | settings)], logits.shape[1]))
    full = torch.zeros_like(logits).scatter(1, ids, weights)[0]
    return full / full.sum()


FOUR = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ({"temperature": 1e-38}, [0, 1, 0, 0]),
        (
            {"temperature": 0.5, "top_p": 0.6},
            [0, 16 / 25, 9 / 25, 0],
        ),  # temperature comes before top-p
        (
            {"top_k": 2, "top_p": 0.5},
            [0, 1, 0, 0],
        ),  # top-p sees what top-k left: 4/7 alone is enough
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.9}, [0, 1, 0, 0]),
    ],
)
def test_distributions_by_hand(settings, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(distribution(FOUR, **settings), expected, atol=1e-6, rtol=1e-5)


def test_repetition_penalty_by_hand():
    logits, history = torch.tensor([[2.0, -2.0, 1.0, 3.0]]), torch.tensor([[0, 1, 1, 0]])
    penalized = engine_room.penalize(logits, history, torch.tensor([[2.0]]))
    torch.testing.assert_close(penalized, torch.tensor([[1.0, -4.0, 1.0, 3.0]]))


@pytest.mark.parametrize("seed", range(20))
def test_rules_equal_transformers(seed):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    settings = {
        "temperature": some(0.2, 3),
        "top_p": some(0.05, 1),
        "min_p": some(0, 0.3),
        "top_k": int(some(1, 200)),
    }
    if seed % 4 == 0:
        settings["top_k"] = 0
    logits, penalty = 4 * torch.randn(1, 500, generator=generator), some(0.5, 2)
    history = torch.randint(500, (1, 40), generator=generator)
    chain = [
        process.RepetitionPenaltyLogitsProcessor(penalty),
        process.TemperatureLogitsWarper(settings["temperature"]),
        *([process.TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []),
        process.TopPLogitsWarper(settings["top_p"]),
        process.MinPLogitsWarper(settings["min_p"]),
    ]
    expected = process.LogitsProcessorList(chain)(history, logits.clone()).softmax(dim=-1)[0]
    ours = distribution(
        engine_room.penalize(logits, history, torch.tensor([[penalty]]))[0], **settings
    )
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_temperature_0_is_argmax():
    logits = torch.randn(5, 100)
    picked = pick(
        logits, Rules([GREEDY] * 5, 100), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    )
    assert torch.equal(picked[:, 0], logits.argmax(dim=-1))


def test_a_draw_is_never_of_weight_0():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]] * 4)
    assert draw(
        weights, torch.tensor([[2.0**-24], [0.25], [0.2500001], [1.0]])
    ).flatten().tolist() == [
        1,
        1,
        3,
        3,
    ]


def test_draws_follow_the_distribution():
    rules, count = Rules([Sampling(temperature=1.0, top_k=0, top_p=1.0)], 4), 20_000
    chance = uniforms(5, count)
    tokens = [
        pick(FOUR[None], rules, torch.zeros(1, 1, dtype=torch.long), u.view(1, 1)).item()
        for u in chance[:2000]
    ]
    expected = torch.searchsorted(FOUR.exp().cumsum(0), chance)
    assert tokens == expected[:2000].tolist()
    share = expected.bincount(minlength=4) / count
    torch.testing.assert_close(share, FOUR.exp(), atol=0.015, rtol=0)  # 4 standard deviations


# ---- what is never written


@pytest.mark.parametrize("dtype", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("template", ["chatml", None])
def test_of_control_ids_only_ends_are_written(tmp_path, tiny_tokenizer, dtype, template):
    """Everywhere the likeliest id is a control id: of two opposite rows of the head one has a large logit."""
    source = build(replace(BASE, tie_word_embeddings=False))
    with torch.no_grad():
        rows = 9 * torch.randn(3, 32)
        source.lm_head.weight[[0, 3, 1, 4, 5]] = torch.cat(
            [rows[:1], -rows[:1], rows[1:2], -rows[1:2], rows[2:]]
        )
    save_model(source, tmp_path)
    tiny_tokenizer.save(tmp_path, BASE.sequence_length, template)
    model = open_model(tmp_path, "cpu", dtype)[0]
    never = {0, 1, 3, 4} if template else {0, 1, 3, 4, 5}
    settings = [
        GREEDY,
        PLAIN,
        EVERY_RULE,
        replace(GREEDY, repetition_penalty=3.0),
        replace(PLAIN, temperature=99),
    ]
    for graphs in (False, True):
        asked = [Request(PROMPTS[1], 30, one, top_logprobs=1) for one in settings]
        list(generate(model, asked, Engine(model, len(asked), graphs=graphs)))
        assert not never & {id for request in asked for id in request.ids}
        assert {
            top[0][0] for request in asked for _, top in request.logprobs
        } & never  # the model's own
    exact = exact_log_probs(model, PROMPTS[1] + asked[0].ids)[len(PROMPTS[1]) - 1 :]
    exact[:, list(never)] = -torch.inf
    if dtype == "fp32":
        assert asked[0].ids == exact.argmax(dim=-1).tolist()
    model.unwritten = None
    assert never & set(answer(model, PROMPTS[1], GREEDY, 30))  # else this test could not fail


def test_a_vocabulary_with_one_control_id_may_write_it_and_all_others(tmp_path):
    """As GPT-2's: what ends a text is the only symbol there is, and opens it, too."""
    library = pytest.importorskip("tokenizers")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: id for id, piece in enumerate(["<|endoftext|>", *alphabet])}
    bpe = library.Tokenizer(library.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = library.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    save_model(build(replace(BASE, vocab_size=257, bos_token_id=0, eos_token_id=0)), tmp_path)
    model, tokenizer = open_model(tmp_path, "cpu", "fp32")
    assert (tokenizer.bos_id, tokenizer.eos_id, model.unwritten.tolist()) == (0, 0, [])
    assert answer(model, [0, 5], GREEDY) == uncached(model, [0, 5], GREEDY)


# ---- log-probabilities


@torch.no_grad()
def exact_log_probs(model, row):
    """(T - 1, V): of what follows each id of `row`, by one pass over all of it."""
    return F.log_softmax(model(torch.tensor([row]))[0, :-1], dim=-1)


def agree(known, exact, ids, top):
    """`known`, a list as `Request.logprobs`, says of `ids` what the rows of `exact` (N, V) do."""
    assert len(known) == len(ids) == len(exact)
    assert [own for own, _ in known] == pytest.approx(
        exact[range(len(ids)), ids].tolist(), abs=3e-5
    )
    for (_, likeliest), row in zip(known, exact):
        assert [id for id, _ in likeliest] == row.topk(top).indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(
            row.topk(top).values.tolist(), abs=3e-5
        )


@pytest.mark.parametrize("burst", [1, 4])
def test_recorded_log_probabilities_are_the_models_own(model, burst):
    rows = [Request(prompt, 9, sampling) for prompt, sampling in zip(PROMPTS[1:5], CROWD)]
    rows[1].top_logprobs, rows[2].top_logprobs = 0, 3
    engine = Engine(model, len(rows))
    engine.burst = burst
    list(generate(model, rows, engine))
    for row, top in zip(rows, [None, 0, 3, None]):
        assert row.ids == answer(model, row.prompt, row.sampling, 9)
        exact = exact_log_probs(model, row.prompt + row.ids)[len(row.prompt) - 1 :]
        if top is None:
            assert row.logprobs == []
        else:
            agree(row.logprobs, exact, row.ids, top)


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_scores_are_those_of_one_pass(model, chunk):
    rows = [PROMPTS[6], [1], PROMPTS[3]]
    for row, known in zip(rows, token_logprobs(model, rows, top=2, chunk=chunk), strict=True):
        assert known[0] == (None, [])
        agree(known[1:], exact_log_probs(model, row), row[1:], 2)
    assert all(likeliest == [] for _, likeliest in next(token_logprobs(model, rows, chunk=chunk)))


def test_a_row_beyond_the_context_has_no_score(model):
    assert len(next(token_logprobs(model, [[1] * 48]))) == 48
    with pytest.raises(UserError, match=r"49 tokens.* 48"):
        next(token_logprobs(model, [[1] * 49]))


# ---- seeds


def test_a_seed_gives_its_answer_again_and_none_another(model):
    assert answer(model, PROMPTS[2], PLAIN) == answer(model, PROMPTS[2], PLAIN)
    assert answer(model, PROMPTS[2], PLAIN) != answer(model, PROMPTS[2], replace(PLAIN, seed=4))
    fresh = [answer(model, PROMPTS[2], replace(PLAIN, seed=None)) for _ in range(2)]
    assert fresh[0] != fresh[1]


def test_a_longer_answer_begins_like_a_shorter_one(model):
    assert answer(model, PROMPTS[2], PLAIN, 20)[:5] == answer(model, PROMPTS[2], PLAIN, 5)
    assert torch.equal(uniforms(1, 500)[:3], uniforms(1, 3))


def test_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    answer(model, PROMPTS[2], PLAIN)
    answer(model, PROMPTS[2], replace(PLAIN, seed=None))
    assert torch.equal(torch.get_rng_state(), before)


# ---- where it ends


def test_ends_at_a_stop_id(model):
    full = answer(model, PROMPTS[1], PLAIN)
    request = Request(PROMPTS[1], 10, PLAIN, stop_ids={full[4]})
    list(generate(model, [request]))
    assert (request.ids, request.finish) == (full[: full.index(full[4])], "stop")


@pytest.mark.parametrize(
    ("count", "length", "finish"), [(5, 5, "length"), (42, 41, "context"), (41, 41, "length")]
)
@pytest.mark.parametrize("graphs", [False, True])
def test_ends_at_its_length_or_the_context(model, count, length, finish, graphs):
    request = Request(PROMPTS[1], count, PLAIN)
    list(generate(model, [request], Engine(model, 1, graphs=graphs)))
    assert (len(request.ids), request.finish) == (length, finish)
    assert len(request.prompt) + len(request.ids) <= model.cfg.sequence_length


def test_rows_end_each_at_its_own_place(model):
    rows = [
        Request(PROMPTS[6], 99, GREEDY),
        Request(PROMPTS[0], 99, PLAIN),
        Request(PROMPTS[1], 3, PLAIN),
    ]
    list(generate(model, rows))
    assert [len(row.ids) for row in rows] == [48 - 21, 47, 3]
    assert [row.finish for row in rows] == ["context", "context", "length"]


def test_in_a_burst_a_row_may_end_at_the_context(model):
    """Several steps at a time, as on a GPU, where they end long before the other row does."""
    rows = [Request(PROMPTS[6], 99, GREEDY), Request(PROMPTS[0], 99, PLAIN)]
    engine = Engine(model, len(rows))
    engine.burst = 8
    list(generate(model, rows, engine))
    assert [row.finish for row in rows] == ["context", "context"]
    assert [row.ids for row in rows] == [
        answer(model, row.prompt, row.sampling, 99) for row in rows
    ]


def test_a_reader_ends_a_row(model):
    rows = [Request(PROMPTS[1], 10, PLAIN), Request(PROMPTS[1], 10, GREEDY)]
    for step, _ in enumerate(generate(model, rows)):
        if step == 3:
            rows[0].finish = "stop"
    assert [len(row.ids) for row in rows] == [4, 10]


@pytest.mark.parametrize("length", [48, 49])
def test_a_prompt_that_fills_the_context_is_refused(model, length):
    with pytest.raises(UserError, match=rf"{length} tokens.* 48"):
        answer(model, [1] * length)


# ---- text


def test_the_stream_is_the_text(tiny_tokenizer):
    text = "Why?  the lazy dog \U0001f600 caf\u00e9\n\n"
    ids = tiny_tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        reply = Reply(tiny_tokenizer)
        pieces = [reply.push(id) for id in ids[:cut]] + [reply.end()]
        assert "".join(pieces) == tiny_tokenizer.decode(ids[:cut])
        assert "\ufffd" not in "".join(pieces[:-1])


def test_control_ids_are_not_text(tiny_tokenizer):
    reply = Reply(tiny_tokenizer)
    assert "".join(map(reply.push, range(6))) + reply.end() == ""


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["fox jumps"], "the quick brown "),
        (["x jumps ov"], "the quick brown fo"),
        (["jumps", "over", "brown fox"], "the quick "),
        (["er a lazy cat"], "the quick brown fox jumps over a lazy dog"),
        (["g"], "the quick brown fox jumps over a lazy do"),
        (["t"], ""),
        ([], "the quick brown fox jumps over a lazy dog"),
    ],
)
def test_stop_texts_cut_across_tokens(tiny_tokenizer, stop, expected):
    text = "the quick brown fox jumps over a lazy dog"
    for ids in (tiny_tokenizer.encode(text), [id for c in text for id in tiny_tokenizer.encode(c)]):
        reply, shown = Reply(tiny_tokenizer, stop), ""
        for id in ids:
            shown += reply.push(id)
            assert expected.startswith(shown)  # what was shown is never taken back
        assert reply.stopped == (expected != text)
        assert shown + reply.end() == expected
