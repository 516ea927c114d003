"""Scores: how likely a model finds given ids, and what may be concluded from that.

`score` sums over batches of labels: a long text cut into windows, or the validation rows of train.py.
`answer_scores` tells how likely each of several answers is after a context. Both are pure functions of
(model, ids) and answer in nats. The rest makes perplexities of nats, and of scores accuracies with intervals.
"""

import copy
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from model import KVCache, nats, row_groups, score_batch

# ----------------------------------------------------------------------------------------------
# Text


@torch.no_grad()
def score(model, batches, token_bytes, threads=1):
    """Returns (nats, tokens, bytes): -log p summed over the labels of `batches`, and how many they are.

    batches as `next_token_loss` takes them; token_bytes (V,), how many UTF-8 bytes of text an id stands for.
    Summed in float64, after each batch's own float32 sum. `threads` as in `side_by_side`.
    """
    token_bytes = torch.as_tensor(token_bytes, device=model.lm_head.weight.device)

    found = side_by_side(lambda batch: score_batch(model, batch, token_bytes), batches, threads)
    return tuple(map(sum, zip(*found))) if found else (0.0, 0, 0)


def cores(model):
    """Returns how many threads are worth giving to `side_by_side`."""
    return torch.get_num_threads() if model.lm_head.weight.device.type == "cpu" else 1


def side_by_side(work, items, threads):
    """Returns [work(item), ...], with several `threads` each at an item of its own, on one core.

    On a CPU that is faster than all cores at one item, which wait for each other after every operation,
    the longer the busier the machine is. With one thread it is a plain loop.
    """
    if threads == 1:
        return [work(item) for item in items]
    numbered, lock, results, before = (
        enumerate(items),
        threading.Lock(),
        {},
        torch.get_num_threads(),
    )

    def take():
        with lock:
            return next(numbered, None)

    @torch.no_grad()  # a thread's own setting
    def run():
        torch.set_num_threads(1)
        for number, item in iter(take, None):
            results[number] = work(item)

    try:
        with ThreadPoolExecutor(threads) as pool:
            try:
                for done in as_completed([pool.submit(run) for _ in range(threads)]):
                    done.result()
            except BaseException:
                numbered = iter(())  # the others stop after what they are at
                raise
    finally:
        torch.set_num_threads(before)
    return [results[number] for number in range(len(results))]


def windows(count, context, stride):
    """Yields (start, end, first): inputs start..end of a text of `count` targets, of which first..end count.

    Every target counts once. A window is `context` long - the last one moves back rather than being shorter -
    so every target but the first ones of the text has at least context - stride + 1 tokens before it.
    """
    end = min(context, count)
    yield 0, end, 0
    while end < count:
        first, end = end, min(end + stride, count)
        yield end - context, end, first


def text_batches(ids, opening, context, stride, batch_size, device="cpu"):
    """Yields batches for `score`: each of `ids` is a label once, the first after the id `opening`.

    Windows are those of `windows`, `batch_size` of them side by side. "where": the head works on what counts.
    """
    stream = torch.tensor([opening, *ids])
    cuts = list(windows(len(ids), context, stride))
    for group in (cuts[at : at + batch_size] for at in range(0, len(cuts), batch_size)):
        rows = [torch.arange(first - start, end - start) for start, end, first in group]
        batch = {
            "ids": torch.stack([stream[start:end] for start, end, _ in group]),
            "where": torch.cat(
                [row + number * (group[0][1] - group[0][0]) for number, row in enumerate(rows)]
            ),
            "labels": torch.cat([stream[first + 1 : end + 1] for _, end, first in group]),
        }
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def rates(nats, tokens, words, size):
    """Returns bits per byte, word and token perplexity of `nats` spent on a text of `size` bytes."""
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "word_perplexity": perplexity(nats, words),
        "token_perplexity": perplexity(nats, tokens),
    }


def perplexity(nats, count):
    """Returns exp(nats / count), None where no float can hold it."""
    return math.exp(nats / count) if nats / count < 700 else None


def unigram_nats(ids):
    """Returns the nats of `ids` under their own frequencies: no model without context does better on them."""
    return -sum(count * math.log(count / len(ids)) for count in Counter(ids).values())


# ----------------------------------------------------------------------------------------------
# Answers


@torch.no_grad()
def answer_scores(model, questions, budget, threads=1):
    """Returns for each question [(log p of the answer in nats, is it the greedy one), ...], answers in order.

    questions: [(context ids, [answer ids, ...])], no list empty; context and longest answer may have one id
    more than the model's positions. A context runs once, whatever its number of answers: its last hidden
    state scores their first ids, its keys and values serve the rest. `budget`: about how many positions run
    at once; batches are made of questions of like length. `threads` as in `side_by_side`.
    """
    groups, results = list(_groups(questions, budget)), [None] * len(questions)
    found = side_by_side(
        lambda group: _group_scores(model, [questions[i] for i in group]), groups, threads
    )
    for group, scores in zip(groups, found):
        for number, score in zip(group, scores):
            results[number] = score
    return results


def _groups(questions, budget):
    """Yields lists of indices: equal longest answers, contexts of like length, the longest first."""

    def size(number):
        context, answers = questions[number]
        return max(map(len, answers)), len(context)

    group, longest, width = [], 0, 0
    for number in sorted(range(len(questions)), key=size, reverse=True):
        copies = 1 + (size(number)[0] > 1) * len(
            questions[number][1]
        )  # of the context's keys and values
        if group and (size(number)[0] != longest or (len(group) + 1) * width * copies > budget):
            yield group
            group = []
        if not group:
            longest, width = size(number)
        group.append(number)
    if group:
        yield group


def _group_scores(model, questions):
    """As `answer_scores`, of questions whose longest answers are equally long."""
    weight = model.lm_head.weight
    rows = [(owner, answer) for owner, (_, answers) in enumerate(questions) for answer in answers]
    longest = max(len(answer) for _, answer in rows)
    contexts = _padded([context for context, _ in questions], weight.device)
    owner = torch.tensor([owner for owner, _ in rows], device=weight.device)
    lengths = torch.tensor([len(questions[owner][0]) for owner, _ in rows], device=weight.device)
    cache = None
    if longest > 1:
        capacity = contexts.shape[1] + longest - 1
        cache = KVCache(model.cfg, len(questions), capacity, weight.device, weight.dtype)
    last = model.model(contexts, cache=cache)[owner, lengths - 1]
    found = [[pair] for pair in token_scores(last, weight, [answer[0] for _, answer in rows])]
    if longest > 1:
        for row, pair in _rest(model, cache, rows, owner, lengths):
            found[row].append(pair)
    scores = iter(
        [(-sum(loss for loss, _ in pairs), all(top for _, top in pairs)) for pairs in found]
    )
    return [[next(scores) for _ in answers] for _, answers in questions]


def _rest(model, cache, rows, owner, lengths):
    """Yields (row, what `token_scores` says) of every id of an answer but its first, row by row."""
    long = [row for row, (_, answer) in enumerate(rows) if len(answer) > 1]
    inputs = _padded([rows[row][1][:-1] for row in long], owner.device)
    hidden = model.model(inputs, cache=_copies(cache, owner[long], lengths[long]))
    where = [(at, step) for at, row in enumerate(long) for step in range(len(rows[row][1]) - 1)]
    labels = [id for row in long for id in rows[row][1][1:]]
    pairs = token_scores(hidden[tuple(zip(*where))], model.lm_head.weight, labels)
    return zip([long[at] for at, _ in where], pairs)


def _padded(rows, device):
    """Returns rows of ids as one tensor, filled up at their ends, where causality hides what is there."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def _copies(cache, rows, lengths):
    """Returns a ragged cache of copies of `rows` of `cache`, each `lengths` positions long."""
    copies = copy.copy(cache)
    copies.k, copies.v = ([stored[rows] for stored in layers] for layers in (cache.k, cache.v))
    copies.lengths, copies.start = lengths, None
    return copies


def token_scores(x, weight, labels):
    """Returns [(-log p in nats, is it the likeliest), ...] of N labels for x (N, C), weight (V, C)."""
    pairs, labels = [], torch.tensor(labels, device=x.device)
    for rows, to in row_groups(x, labels, len(weight)):
        logits = rows @ weight.T
        pairs += zip(nats(logits, to).tolist(), (logits.argmax(dim=-1) == to).tolist())
    return pairs


# ----------------------------------------------------------------------------------------------
# From answers to accuracies


def wilson(hits, n, z=1.959964):
    """Returns the 95 % confidence interval (low, high) of a share of `hits` in `n` (Wilson 1927)."""
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / n / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def best(scores):
    """Returns the index of the largest score, the first of equals."""
    return max(range(len(scores)), key=scores.__getitem__)


def without_prior(scores):
    """Returns scores (rows of one length) with what all rows agree on removed: each column's mean is 0.

    A row is normalized to log-probabilities over its answers first. For two answers it is the log-odds less
    their mean over the dataset. That takes no label, but all rows at once (after Batch Calibration, Zhou et
    al. 2024).
    """
    table = torch.tensor(scores, dtype=torch.float64).log_softmax(dim=1)
    return (table - table.mean(dim=0)).tolist()


def accuracy(chosen, gold):
    """Returns {"accuracy", "n", "ci95"} of the indices `chosen` where `gold` were right."""
    hits = sum(map(int.__eq__, chosen, gold))
    return {"accuracy": hits / len(gold), "n": len(gold), "ci95": list(wilson(hits, len(gold)))}


def multiple_choice(scores, sizes, gold, names=None):
    """Returns what is known of a model from its log-likelihoods `scores` of the answers to some questions.

    sizes: the lengths of the answers, in characters; gold: the right ones' indices; names: of the answers, if
    all questions have the same ones. Only then are a prior to remove and a majority by name.
    """
    chosen = [best(row) for row in scores]
    normed = [best([s / max(1, n) for s, n in zip(*pair)]) for pair in zip(scores, sizes)]
    index, count = Counter(gold).most_common(1)[0]
    majority, chance = count / len(gold), sum(1 / len(row) for row in scores) / len(scores)
    result = accuracy(chosen, gold) | {"accuracy_norm": accuracy(normed, gold)["accuracy"]}
    result |= {"majority": majority, "chance": chance, "calibrated_accuracy": None}
    if names:
        result |= calibrated(scores, gold) | {"majority_answer": names[index]}
        result["predicted"] = {name: chosen.count(at) for at, name in enumerate(names)}
    always = (
        f"always answering {names[index]!r}" if names else f"always answering number {index + 1}"
    )
    baseline = max((majority, always), (chance, "guessing"))
    return result | {"verdict": verdict(result["ci95"], *baseline)}


def calibrated(scores, gold):
    """Returns accuracy, interval and verdict without the prior; the baseline: the same answers, shuffled."""
    chosen = [best(row) for row in without_prior(scores)]
    result = accuracy(chosen, gold)
    shuffled = sum(chosen.count(at) * gold.count(at) for at in set(gold)) / len(gold) ** 2
    result["verdict"] = verdict(result["ci95"], shuffled, "the same answers in random order")
    return {f"calibrated_{key}": result[key] for key in ("accuracy", "ci95", "verdict")}


def verdict(interval, baseline, what):
    """Returns in words how an accuracy with this interval stands to a baseline named `what`."""
    low, high = interval
    if low > baseline:
        return f"better than the baseline, {what} ({baseline:.1%})"
    if high < baseline:
        return f"worse than the baseline, {what} ({baseline:.1%})"
    return f"not distinguishable from the baseline, {what} ({baseline:.1%})"
