"""Scores: as one token at a time, as published tables say."""

import math
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluation
from eval import answer_scores, multiple_choice, text_nats, text_result
from model import Llama, ModelConfig

SHAPE = {"n_layer": 2, "d_model": 32, "n_head": 4, "num_key_value_heads": 2, "d_ff": 64}
CFG = ModelConfig(**SHAPE, vocab_size=90, sequence_length=24, initializer_range=0.3)
BOS = CFG.bos_token_id


@pytest.fixture(scope="module", params=["math", "sdpa"])
def model(request):
    torch.manual_seed(1)
    model = Llama(CFG).eval()
    model.use_attention(request.param)
    return model


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(3, CFG.vocab_size, count).tolist()


@torch.no_grad()
def log_p(model, context, id):
    """log p(id | context), from the logits of exactly this context."""
    return model(torch.tensor([context]))[0, -1].double().log_softmax(-1)[id].item()


# ---- text


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 40))
def test_every_target_counts_once_with_as_much_context_as_promised(count, context, stride):
    stride = min(stride, context)
    targets = []
    for start, end, first in evaluation.windows(count, context, stride):
        assert end - start == min(context, count)
        assert first == 0 or first - start >= context - stride
        targets += range(first, end)
    assert targets == list(range(count))


@pytest.mark.parametrize("stride", [1, 5, 12, 24])
def test_a_text_scores_as_one_token_at_a_time(model, stride):
    ids, context = ids_of(100), 24
    stream, expected = [BOS, *ids], 0.0
    for start, end, first in evaluation.windows(len(ids), context, stride):
        expected -= sum(log_p(model, stream[start : at + 1], ids[at]) for at in range(first, end))
    nats = text_nats(model, ids, BOS, context, stride, rows=3)
    assert nats == pytest.approx(expected, rel=1e-5)


def test_neither_threads_nor_the_batch_size_change_a_number(model):
    results, before = [], torch.get_num_threads()
    for count, rows in ((2, 1), (3, 99), (1, 2)):
        torch.set_num_threads(count)
        nats = text_nats(model, ids_of(500), BOS, 24, 7, rows)
        scores = chain.from_iterable(answer_scores(model, questions_of(SIZES), 30))
        results.append([nats, *(value for value, _ in scores)])
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    assert results[1] == pytest.approx(results[0], abs=1e-3)
    assert results[2] == pytest.approx(results[0], abs=1e-3)


def test_a_text_is_held_against_baselines():
    letters = SimpleNamespace(vocab_size=8, decode=lambda ids: "".join("abcd efg"[i] for i in ids))
    text, ids = "aaab", [0, 0, 0, 1]
    result = text_result(3.0, text, ids, letters)
    entropy = (-3 * math.log(3 / 4) - math.log(1 / 4)) / 4
    assert result["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 4)
    assert result["word_perplexity"] == pytest.approx(math.exp(3))
    baselines = result["baselines"]
    assert baselines["unigram"]["token_perplexity"] == pytest.approx(math.exp(entropy))
    assert baselines["uniform"]["token_perplexity"] == pytest.approx(8)
    assert (result["lossless"], result["verdict"]) == (True, "better than uniform, gzip, xz")
    best = text_result(1.0, text, ids, letters)
    assert best["verdict"] == "better than uniform, unigram, gzip, xz"
    lossy = "better than gzip, xz; too low: the tokenizer loses parts of this text"
    assert text_result(99.0, "aaac", ids, letters)["verdict"] == lossy


# ---- answers


# (length of the context, [lengths of the answers])
SIZES = [(5, [1, 1]), (24, [1, 1]), (1, [1, 1]), (9, [1, 3]), (22, [3, 1, 2]), (7, [3])]
SIZES += [(20, [5, 5]), (3, [2])]


def questions_of(sizes):
    """Returns [(context, answers)] of random ids."""
    questions = []
    for n, (length, answers) in enumerate(sizes):
        context = [BOS, *ids_of(length - 1, n)]
        questions.append((context, [ids_of(size, 100 * n + k) for k, size in enumerate(answers)]))
    return questions


@torch.no_grad()
def one_by_one(model, context, answer):
    total, greedy = 0.0, True
    for at, id in enumerate(answer):
        total += log_p(model, context + answer[:at], id)
        greedy &= model(torch.tensor([context + answer[:at]]))[0, -1].argmax().item() == id
    return total, greedy


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_answers_score_as_one_token_at_a_time(model, budget):
    questions = questions_of(SIZES)
    context, answers = questions[3]
    with torch.no_grad():
        answers[0] = [model(torch.tensor([context]))[0, -1].argmax().item()]  # one that is greedy
    seen = set()
    rows = answer_scores(model, questions, budget)
    for (context, answers), scores in zip(questions, rows, strict=True):
        for answer, (got, greedy) in zip(answers, scores, strict=True):
            expected, best = one_by_one(model, context, answer)
            assert (got, greedy) == (pytest.approx(expected, abs=1e-4), best)
            seen.add(greedy)
    assert seen == {True, False}


def yes_no(yes_odds, gold):
    """What `multiple_choice` says of a model that gives question n these log-odds of yes."""
    rows = [[0.0, odds] for odds in yes_odds]
    return multiple_choice(rows, [(2, 3)] * len(rows), gold, ["no", "yes"])


def test_a_model_that_always_says_yes_scores_the_yes_rate():  # trap B44
    gold = [1] * 62 + [0] * 38
    got = yes_no([4.0] * 100, gold)
    assert (got["accuracy"], got["majority"], got["majority_answer"]) == (0.62, 0.62, "yes")
    assert (got["n"], got["predicted"]) == (100, {"no": 0, "yes": 100})
    assert got["verdict"] == "not distinguishable from the baseline, always answering 'yes' (62.0%)"


def test_calibration_takes_away_the_prior_and_nothing_else():
    gold = [0, 1] * 50
    got = yes_no([3.0 + (1 if right else -1) for right in gold], gold)  # it knows, but leans to yes
    assert (got["accuracy"], got["calibrated_accuracy"]) == (0.5, 1.0)
    verdict = "better than the baseline, the same answers in random order (50.0%)"
    assert got["calibrated_verdict"] == verdict


def test_long_answers_are_also_compared_by_the_character():
    got = multiple_choice([[-3.0, -4.0], [-9.0, -4.0]], [(3, 8), (30, 2)], [1, 0])
    assert (got["accuracy"], got["accuracy_norm"], got["calibrated_accuracy"]) == (0.0, 1.0, None)
    assert (got["chance"], got["majority"]) == (0.5, 0.5)


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)]
NEWCOMBE += [(0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("hits", "n", "low", "high"), NEWCOMBE)
def test_wilson_intervals_are_those_of_the_table(hits, n, low, high):
    assert evaluation.wilson(hits, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(n - hits, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(
    ("baseline", "words"),
    [(0.63, "not distinguishable from"), (0.5, "better than"), (0.7, "worse than")],
)
def test_a_verdict_needs_more_than_the_baseline(baseline, words):
    result = evaluation.accuracy([1] * 630 + [0] * 370, [1] * 1000, baseline, "b")  # 0.60 to 0.66
    assert result["verdict"] == f"{words} the baseline, b ({baseline:.1%})"
