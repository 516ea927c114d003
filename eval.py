"""Measures a language model: perplexity of a text, answers to questions, responses to prompts.

    python eval.py --model_path=checkpoints/pretrain/tiny/final --output_dir=evaluation_results/tiny
    python eval.py compare evaluation_results/a evaluation_results/b
    python eval.py assess evaluation_results/tiny

A text is scored in windows, every token once. Questions are answered by likelihood. Smoke prompts
are answered by generation and scored by plain counts: these scores tell broken from working, not
good from better, so read the responses. A part out of reach is "not measured", never 0.
"""

import gzip
import hashlib
import json
import math
import random
import re
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from textwrap import indent
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from corpus.files import kind_of, text_of
from corpus.rows import ROW_READERS
from corpus.samples import passes
from corpus.sources import BadRow, Unreachable, usable_rows
from lib import config
from lib.config import PositiveInt, Range, UserError, refusing
from lib.conversation import render_prompt, stop_ids
from lib.runtime import tune_cpu
from model import count_parameters, identify, linear_cross_entropy, row_groups
from sample import Request, Sampling, generate, open_model


@dataclass(frozen=True)
class EvalConfig:
    """What to measure, on what, and how."""

    model_path: str  # a model or adapter folder, or that of a whole training
    output_dir: str = "evaluation_results"  # results.json and report.md go here
    perplexity_path: str = "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"  # a text file, or hf:
    boolq_path: str = "hf:google/boolq::validation"  # a file of {question, passage, answer}, or hf:
    tasks: tuple[str, ...] = ()  # files of questions, or hf:, by commas; docs/REFERENCE.md has rows
    custom_prompts: str | None = None  # smoke prompts of your own: rows, or .txt with one a line
    skip_perplexity: bool = False  # leave it out
    skip_boolq: bool = False  # leave it out
    fast_mode: bool = False  # a part of everything, and stride = context: minutes become seconds
    detailed_output: bool = False  # report.md with every prompt, response and score
    max_boolq_samples: PositiveInt | None = None  # so many questions, drawn by `seed`; none = all
    context: PositiveInt | None = None  # tokens of a window; none = all the model has positions for
    stride: PositiveInt | None = None  # tokens a window moves on; none = half of context
    batch_size: PositiveInt | None = None  # windows side by side; none = 2,048 tokens (GPU: 32,768)
    max_new_tokens: PositiveInt = 64  # of a response to a smoke prompt
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0  # of samples, and of which questions are drawn
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of weights; 16 bits: faster, less exact


# ---- Scores: how likely a model finds given ids, in nats. B batch, T positions, C width


def side_by_side(work, items, rows, device):
    """Yields work(group) of groups of `rows` items, in order; on a CPU each core works on its own.

    All cores at one group wait for each other after every operation: 1.8 times slower on two.
    """
    groups = [items[at : at + rows] for at in range(0, len(items), rows)]
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = pool.map(torch.no_grad()(work), groups)  # no_grad acts in its own thread only
        yield from tqdm(results, total=len(groups), unit=" batches", disable=None)


def windows(count, context, stride):
    """Returns [(start, end, first)]: inputs start..end, of whose targets first..end count.

    Every target counts once; all but the first see at least context - stride + 1 tokens.
    """
    ends = [*range(context, count, stride), count]
    return [(max(0, end - context), end, first) for first, end in zip([0, *ends], ends)]


def text_nats(model, ids, first_id, context, stride, rows):
    """Returns the sum of -log p over `ids`, after first_id; `rows` windows run together."""
    weight, cuts = model.lm_head.weight, windows(len(ids), context, stride)
    stream = torch.tensor([first_id, *ids], device=weight.device)

    def work(group):
        x = model.model(torch.stack([stream[start:end] for start, end, _ in group]))  # (B, T, C)
        # the head works only on the positions that count
        x = torch.cat([row[first - start :] for row, (start, _, first) in zip(x, group)])
        labels = torch.cat([stream[first + 1 : end + 1] for _, end, first in group])
        return float(linear_cross_entropy(x, weight, labels))

    return sum(side_by_side(work, cuts, rows, weight.device))


def answer_scores(model, questions, rows):
    """Returns for each question [(log p of the answer in nats, is it the greedy one), ...].

    questions: [(context ids, [answer ids, ...])], no list empty; a context and its longest answer
    may have one id more than the model's positions. `rows` texts run together. The model reads a
    context with an answer but for its last id, so answers of one token share one text.
    """
    texts = {}  # {the ids that are read: the answers}
    for context, answers in questions:
        for answer in answers:
            texts.setdefault((*context, *answer[:-1]), set()).add(tuple(answer))
    order = sorted(texts.items(), key=lambda item: len(item[0]), reverse=True)  # little padding
    results = side_by_side(partial(group_scores, model), order, rows, model.lm_head.weight.device)
    scores = {pair: score for group in results for pair, score in group.items()}
    return [[scores[(*ids, *a[:-1]), tuple(a)] for a in answers] for ids, answers in questions]


def group_scores(model, texts):
    """Returns {(text, answer): (log p, is it greedy)} of [(ids of a text, its answers), ...]."""
    weight = model.lm_head.weight
    ids = pad_sequence([torch.tensor(text) for text, _ in texts], batch_first=True)
    x = model.model(ids.to(weight.device))  # (B, T, C); no id looks at the zeros after it
    pairs = [(row, text, a) for row, (text, answers) in enumerate(texts) for a in answers]
    x = torch.cat([x[row, len(text) - len(a) : len(text)] for row, text, a in pairs])
    labels = torch.tensor([id for _, _, answer in pairs for id in answer], device=weight.device)
    scored = []  # (-log p, is it the likeliest) of every id of every answer
    for part, to in row_groups(x, labels, len(weight)):
        logits = part @ weight.T
        losses = F.cross_entropy(logits.float(), to, reduction="none")
        scored += zip(losses.tolist(), (logits.argmax(dim=-1) == to).tolist())
    scored, scores = iter(scored), {}
    for _, text, answer in pairs:
        losses, greedy = zip(*islice(scored, len(answer)))
        scores[text, answer] = -sum(losses), all(greedy)
    return scores


# ---- From answers to accuracies


def wilson(hits, n, z=1.959964):
    """Returns the 95% confidence interval (low, high) of a share, hits / n (Wilson 1927)."""
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / n / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(chosen, gold, baseline, name):
    """Returns {"accuracy", "n", "ci95", "verdict"} of the indices `chosen`; `gold` is right."""
    hits = sum(map(int.__eq__, chosen, gold))
    low, high = wilson(hits, len(gold))
    words = "better than" if low > baseline else "not distinguishable from"
    words = "worse than" if high < baseline else words
    result = {"accuracy": hits / len(gold), "n": len(gold), "ci95": [low, high]}
    return result | {"verdict": f"{words} the baseline, {name} ({baseline:.1%})"}


def multiple_choice(scores, sizes, gold, names=None):
    """Returns accuracies and a verdict from the log-likelihoods `scores` of answers to questions.

    sizes: of the answers, in characters; gold: indices; names: of answers that all questions share.
    """
    chosen = [int(np.argmax(row)) for row in scores]
    by_size = [int(np.argmax(np.divide(*pair))) for pair in zip(scores, sizes)]
    index, count = Counter(gold).most_common(1)[0]
    majority, chance = count / len(gold), sum(1 / len(row) for row in scores) / len(scores)
    always = f"always answering {repr(names[index]) if names else f'number {index + 1}'}"
    result = accuracy(chosen, gold, *max((majority, always), (chance, "guessing")))
    result["accuracy_norm"] = sum(map(int.__eq__, by_size, gold)) / len(gold)
    return result | {"majority": majority, "chance": chance}


# ---- Reading texts, questions and prompts

CONFIGS = Path(__file__).parent / "configs" / "eval"
ALPHABET, DIGITS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], [*"0123456789"]
YES_NO = [False, True, "false", "true", "no", "yes", *DIGITS[:2]]
ASK = "Question: {}\nAnswer:"
ABOUT = "The following are multiple choice questions (with answers) about {}.\n\n"
QUESTION = (
    "{question, passage, answer: true or false}, {context, choices: two texts or more, answer: a "
    "choice or its index from 0}, {text: two words or more} or row of MMLU, ARC, HellaSwag or PIQA"
)


def rows_in(path, convert, form):
    """Returns [(where, kind, value)] of all rows; a row that is no `form` is a UserError."""

    def checked(row):
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()  # are all characters whole?
            return convert(row)
        except Exception as problem:  # anything may come of somebody else's JSON
            raise BadRow("unusable", f"not {form}: {row!r:.80} ({problem})") from None

    return usable_rows(path, checked, max_bad=0)


def read_text(path):
    """Returns a text to the byte; rows of a table or of the hub are joined by blank lines."""
    if path.startswith("hf:") or kind_of(Path(path)) in ROW_READERS:
        to_text = lambda row: ("text", row["text"] + "")  # a TypeError for other values
        texts = [text for _, _, text in rows_in(path, to_text, '{"text": a text}')]
        # the hub keeps WikiText's lines as rows, and blank lines as empty texts
        wikitext = re.match("hf:.*wikitext", path.lower())
        text = "".join(t or " \n" for t in texts) if wikitext else "\n\n".join(texts)
    else:
        text = text_of(Path(path))
    if not text.strip():
        raise UserError(f"{path}: holds no text")
    return text


def to_question(row):
    """Returns the `question` of a row, in the words of lm-eval's task of this shape."""
    match row:
        case {"question": str(ask), "choices": {"text": texts, "label": names}, "answerKey": key}:
            key = "" if key is None else str(key)  # a label, never an index
            return question("arc", ASK.format(ask), texts, key, names)
        case {"question": str(ask), "choices": [*texts], "answer": key, **others}:
            if others.keys() & {"context", "passage"}:
                raise ValueError("a text and a question: give both as context")
            letters = ALPHABET[: len(texts)]
            lines = [letter + ". " + text for letter, text in zip(letters, texts, strict=True)]
            about = ABOUT.format(row["subject"].replace("_", " ")) if row.get("subject") else ""
            context = about + "\n".join([ask.strip(), *lines, "Answer:"])
            return question("mmlu", context, letters, key, letters + texts)
        case {"ctx": str(context), "endings": [*texts], "label": key}:
            if {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
                context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            texts = [text.strip().replace(" [title]", ". ") for text in [context, *texts]]
            # lm-eval, too, leaves out WikiHow's marks in brackets
            context, *texts = (re.sub(r"\[.*?\]", "", text).replace("  ", " ") for text in texts)
            return question("hellaswag", context, texts, key, DIGITS[: len(texts)])
        case {"goal": str(ask), "sol1": str(first), "sol2": str(second), "label": key}:
            return question("piqa", ASK.format(ask), [first, second], key, DIGITS[:2])
        case {"passage": str(text), "question": str(ask), **others}:
            key = others.get("label", others.get("answer"))
            key = key.lower() if isinstance(key, str) else key
            return question("boolq", f"{text}\n{ASK.format(f'{ask}?')}", ["no", "yes"], key, YES_NO)
        case {"context": str(context), "choices": [*texts], "answer": key}:
            space = "" if context[-1:].isspace() else " "
            choices = [text if text[0].isspace() else space + text for text in texts]
            return question("multiple-choice", context, choices, key, texts, space="")
        case {"text": str(text)}:
            context, word = text.strip().rsplit(" ", 1)
            return "last-word", (context, (" " + word,), 0)
    raise ValueError("other fields")


def question(shape, context, choices, answer, names, space=" "):
    """Returns (shape, (context, choices, the right one's index)); choices begin with their space.

    An answer is an index from 0, or one of `names`: of all choices in order, perhaps several times
    over. Without an answer, as test splits are, the index is None.
    """
    if (count := len(choices)) < 2 or len(names) % count:
        raise ValueError(f"{count} choices, {len(names)} names")
    choices = tuple(space + choice for choice in choices)
    if answer in (None, "", -1, "-1"):
        return shape, (context, choices, None)
    right = names.index(answer) % count if answer in names else range(count).index(answer)
    return shape, (context, choices, right)


def start_id(tokenizer):
    """Returns the id after which a text's first token is scored, as in lm-eval: BOS, else EOS."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_questions(tokenizer, rows, positions):
    """Returns ([(context ids, [answer ids, ...])], how many contexts lost their beginning).

    As in lm-eval, an answer's ids are those it adds; the context's last blanks belong to it, and
    before the context stands what the tokenizer puts there, or without any context `start_id`.
    """
    encoded, cut = [], 0
    for where, _, (text, choices, _) in rows:
        context = tokenizer.encode(text.rstrip())
        answers = [tokenizer.encode(text + choice)[len(context) :] for choice in choices]
        opening = tokenizer.opening or ([] if context else [start_id(tokenizer)])
        # opening, context, all but an answer's last token
        room = positions + 1 - len(opening) - max(map(len, answers))
        if room < 1 or not all(answers):
            fits = f"1 to {positions - 1} of the model's {positions} positions"
            raise UserError(f"{where}: after its context each answer must take {fits}")
        cut += len(context) > room
        encoded.append(([*opening, *context[-room:]], answers))
    return encoded, cut


@dataclass(frozen=True)
class Prompt:
    """A row of configs/eval/smoke_prompts.json, or of --custom_prompts."""

    prompt: str
    base: str | None = None  # the text that a model without a chat template continues
    category: str = "custom"
    check: dict | None = None  # {"kind": exact, word, number, overlap or regex, "answer": a text}
    keywords: tuple[str, ...] = ()  # where there is no check: words that a response may use
    min_words: Annotated[int, Range(1, 1000)] = 4  # of a response
    quick: bool = False  # asked in fast mode too


def read_prompts(path=None, fast=False):
    """Returns the Prompts of a file, by default our 40; with `fast` those marked quick, if any."""
    path = str(path or CONFIGS / "smoke_prompts.json")
    if path.endswith(".txt"):
        prompts = [Prompt(line.strip()) for line in read_text(path).split("\n") if line.strip()]
    else:
        prompts = [prompt for _, _, prompt in rows_in(path, to_prompt, '{"prompt": text, ...}')]
    return [prompt for prompt in prompts if fast and prompt.quick] or prompts


def to_prompt(row):
    """Returns ("prompt", Prompt) of a text or an object; keys that are no fields are ignored."""
    row, options = {"prompt": row} if isinstance(row, str) else row, config.options_of(Prompt)
    names = row.keys() & options
    prompt = Prompt(**{key: config.accept(key, row[key], options[key], "prompt") for key in names})
    score_response(prompt, "words", "stop")  # a check that cannot work fails here
    return "prompt", prompt


# ---- Smoke prompts

SAMPLING = Sampling(temperature=0.5, top_p=0.95, top_k=0)  # cooler, a base model repeats itself
WORD_OR_NUMBER = re.compile(r"[^\W_]+(?:['.,:][^\W_]+)*")
SENTENCE_END = re.compile(r"[.!?][\"')*]*(?=\s|$)")


def score_response(prompt, response, finish):
    """Returns {"score", "parts"}: the mean of the parts, each from 0 to 1; all 0 without words.

    repetition: the share of its runs of eight characters that are not repeated
    ending: 1 if the model stopped by itself, else the share up to the end of the last sentence
    answer: 1 or 0 by the prompt's check; without one, keywords / 3, at most 1; None without both
    length: words / min_words, at most 1; a right answer may be short
    An echo of the prompt does not count.
    """
    text = response.replace("\u2019", "'")
    for asked in filter(None, (prompt.prompt, prompt.base)):
        text = re.sub(rf"(?<!\w){re.escape(asked)}(?!\w)", " ", text).strip()
    words, answer = len(WORD_OR_NUMBER.findall(text)), None
    if not words:
        return {"score": 0, "parts": dict.fromkeys(("repetition", "ending", "answer", "length"), 0)}
    runs = [text[at : at + 8] for at in range(max(1, len(text) - 7))]
    end = max((mark.end() for mark in SENTENCE_END.finditer(text)), default=0)
    if prompt.check:
        answer = float(passes(prompt.check, text))
    elif prompt.keywords:
        forms = [rf"\b{re.escape(k)}(?:'?s|es|d|ed|ing|er|ers|y|ly)?\b" for k in prompt.keywords]
        hits = sum(bool(re.search(form, text, re.IGNORECASE)) for form in forms)
        answer = min(1.0, hits / min(3, len(forms)))
    parts = {"repetition": len(set(runs)) / len(runs), "answer": answer}
    parts["ending"] = 1.0 if finish == "stop" else end / len(text)
    parts["length"] = 1.0 if prompt.check and answer else min(1.0, words / prompt.min_words)
    return {"score": mean(parts.values()), "parts": parts}


def mean(values):
    """Returns the mean of the values that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def ask_prompts(model, tokenizer, prompts, max_new_tokens=64, seed=0):
    """Returns the "smoke" of results.json: every prompt is answered once, and the response scored.

    A model with a chat template is asked `prompt` in it, any other continues `base`. A response is
    sampled with a seed made of `seed` and its prompt: no other prompt changes it.
    """
    template, requests, rows = tokenizer.template, [], []
    for prompt in prompts:
        text = prompt.prompt if template else prompt.base or prompt.prompt
        rows.append({"prompt": prompt.prompt, "asked": text, "category": prompt.category})
        ids = render_prompt(tokenizer, [{"role": "user", "content": text}], template)
        sampling = replace(SAMPLING, seed=zlib.crc32(f"{seed} {prompt.prompt}".encode()))
        requests.append(Request(ids, max_new_tokens, sampling, stop_ids(tokenizer, template)))
    for at in range(0, len(requests), 64):
        list(generate(model, requests[at : at + 64]))
    for prompt, request, row in zip(prompts, requests, rows):
        text = tokenizer.decode(request.ids)
        row["response"] = text.strip() if template else text  # a template may leave a space to it
        row |= score_response(prompt, row["response"], request.finish) | {"finish": request.finish}
    of = lambda category: [row["score"] for row in rows if row["category"] == category]
    return {
        "score": mean(row["score"] for row in rows),
        "parts": {key: mean(row["parts"][key] for row in rows) for key in rows[0]["parts"]},
        "by_category": {row["category"]: mean(of(row["category"])) for row in rows},
        "eos_rate": mean(row["finish"] == "stop" for row in rows),
        "settings": {"template": template, "temperature": SAMPLING.temperature, "seed": seed}
        | {"top_p": SAMPLING.top_p, "max_new_tokens": max_new_tokens},
        "responses": rows,
    }


# ---- The measurement

FAST_BYTES, FAST_QUESTIONS = 100_000, 100
# what the numbers of results.json mean; names of texts, by the beginning of their sha256
DESCRIPTIONS = json.loads((CONFIGS / "protocol.json").read_text(encoding="utf-8"))


def main(cfg):
    began, out = time.monotonic(), Path(cfg.output_dir)
    with refusing(OSError, f"output_dir {out}: cannot be made", "name another"):
        out.mkdir(parents=True, exist_ok=True)
    tune_cpu()
    model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype)

    def prepared(flag, prepare, path, skip=False):
        """Returns a function that measures, or that says why a part is not measured."""
        reason = "skipped, as asked"
        try:
            if not skip:
                return prepare(cfg, model, tokenizer, path)
        except Unreachable as problem:
            reason = f"{problem}; --{flag}=FILE takes one of yours"
        return lambda: {"verdict": "not measured", "reason": reason}

    # everything is read and checked before anything is measured: a typing error costs no hour
    prompts = read_prompts(cfg.custom_prompts, cfg.fast_mode)
    text = prepared("perplexity_path", prepare_text, cfg.perplexity_path, cfg.skip_perplexity)
    boolq = prepared("boolq_path", prepare_task, cfg.boolq_path, cfg.skip_boolq)
    tasks = {path: prepared("tasks", prepare_task, path) for path in cfg.tasks}
    print(f"{len(prompts)} smoke prompts", file=sys.stderr, flush=True)
    smoke = ask_prompts(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    protocol = {key: getattr(cfg, key) for key in ("fast_mode", "seed", "dtype")}
    protocol |= DESCRIPTIONS["protocol"] | {"device": model.lm_head.weight.device.type}
    results = {"model": model_facts(cfg, model, tokenizer), "protocol": protocol}
    results |= {"perplexity": text(), "boolq": boolq()}
    results |= {"tasks": {path: task() for path, task in tasks.items()}, "smoke": smoke}
    protocol["seconds"] = round(time.monotonic() - began, 1)
    # NaN and infinity are no results
    with refusing(ValueError, f"{cfg.model_path}: overflows in {cfg.dtype}", "use --dtype=fp32"):
        content = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    config.write_whole(out / "results.json", content.encode())
    (out / "report.md").write_text(report_text(results, cfg.detailed_output), encoding="utf-8")
    print(headline(results), f"\n{out / 'results.json'}, {out / 'report.md'}", sep="\n")


def model_facts(cfg, model, tokenizer):
    shape, counts = model.cfg, count_parameters(model.cfg)
    facts = {"path": cfg.model_path, "name": shape.model_name, "template": tokenizer.template}
    facts |= {"sha256": identify(cfg.model_path).sha256, "tokenizer_sha256": tokenizer.sha256}
    facts |= {"parameters": counts["total"], "non_embedding": counts["non_embedding"]}
    return facts | {"config": asdict(shape)}


def rows_at_once(cfg, model, context):
    tokens = 2048 if model.lm_head.weight.device.type == "cpu" else 32768
    return cfg.batch_size or max(1, tokens // context)


def perplexity(nats, count):
    """Returns exp(nats / count), None where no float can hold it."""
    return math.exp(nats / count) if nats / count < 700 else None


def prepare_text(cfg, model, tokenizer, path):
    """Reads and encodes a text; returns the function that measures "perplexity"."""
    limit = model.cfg.sequence_length
    context = cfg.context or limit
    stride = cfg.stride or (context if cfg.fast_mode else max(1, context // 2))
    if context > limit or stride > context:
        need = f"need stride <= context <= {limit}, the model's positions"
        raise UserError(f"context {context} and stride {stride}: {need}")
    text = read_text(path)
    size, sha256, part = len(text.encode()), hashlib.sha256(text.encode()).hexdigest(), "all"
    if cfg.fast_mode and size > FAST_BYTES:
        text = text.encode()[:FAST_BYTES].decode("utf-8", "ignore")
        part = f"the first {len(text.encode()):,} of {size:,} bytes"
    # as lm-eval: where the tokenizer itself adds BOS, that is predicted too, after another
    opening, first_id = tokenizer.opening if tokenizer.adds_bos else [], start_id(tokenizer)
    ids, rows = [*opening, *tokenizer.encode(text)], rows_at_once(cfg, model, context)
    name = DESCRIPTIONS["texts"].get(sha256[:32])
    about = {"path": path, "name": name, "sha256": sha256, "part": part}

    def measure():
        nats = text_nats(model, ids, first_id, context, stride, rows)
        result = text_result(nats, text, ids, tokenizer)
        return result | {"text": about, "context": context, "stride": stride}

    return measure


def text_result(nats, text, ids, tokenizer):
    """Returns rates of the nats spent on a text, beside the rates of baselines."""
    raw, tokens, words = text.encode(), len(ids), len(re.findall(r"\s+", text)) + 1

    def rates(nats):
        bits = {"bits_per_byte": nats / math.log(2) / len(raw)}
        counts = {"word_perplexity": words, "token_perplexity": tokens}
        return bits | {name: perplexity(nats, count) for name, count in counts.items()}

    byte, lossless = 8 * math.log(2), tokenizer.decode(ids) == text
    baselines = {
        "uniform": rates(tokens * math.log(tokenizer.vocab_size)),
        # the ids under their own frequencies: the best a model without context can do
        "unigram": rates(-sum(n * math.log(n / tokens) for n in Counter(ids).values())),
        "gzip": rates(byte * len(gzip.compress(raw, 9, mtime=0))),
    }
    result, key = rates(nats), "bits_per_byte"
    beaten = ", ".join(name for name in baselines if result[key] < baselines[name][key])
    loss = "" if lossless else "; too low: the tokenizer loses parts of this text"
    result |= {"verdict": f"better than {beaten or 'no baseline'}{loss}", "lossless": lossless}
    result |= {"nats": nats, "tokens": tokens, "words": words, "lines": text.count("\n")}
    return result | {"bytes": len(raw), "baselines": baselines}


def prepare_task(cfg, model, tokenizer, path):
    """Reads, draws and encodes the questions of a file; returns the function that answers them."""
    found, is_boolq = rows_in(path, to_question, QUESTION), path == cfg.boolq_path
    shape, *others = sorted({shape for _, shape, _ in found})
    if others or (is_boolq and shape != "boolq"):
        remedy = "give --boolq_path questions with passages, and --tasks one file for each kind"
        raise UserError(f"{path}: holds {' and '.join([shape, *others])} rows; {remedy}")
    if not (rows := [row for row in found if row[2][2] is not None]):
        raise UserError(f"{path}: none of its {len(found)} rows has an answer; name another split")
    total, limit = len(rows), FAST_QUESTIONS if cfg.fast_mode else len(rows)
    limit = min(total, (is_boolq and cfg.max_boolq_samples) or limit)
    rows = [rows[at] for at in sorted(random.Random(cfg.seed).sample(range(total), limit))]
    context = model.cfg.sequence_length
    encoded, cut = encode_questions(tokenizer, rows, context)

    def measure():
        skipped = f"; {len(found) - total:,} without an answer" if total < len(found) else ""
        print(f"{len(rows):,} {shape} questions of {path}{skipped}", file=sys.stderr, flush=True)
        scores = answer_scores(model, encoded, rows_at_once(cfg, model, context))
        values = [[value for value, _ in row] for row in scores]
        about = {"nats": -sum(map(sum, values)), "path": path, "rows": total, "cut": cut}
        about |= {"shape": shape, "without_answer": len(found) - total}
        if shape == "last-word":
            right = [int(greedy) for ((_, greedy),) in scores]
            about["verdict"] = "right where every token of the last word is the likeliest"
            about["perplexity"] = perplexity(about["nats"], len(rows))
            return accuracy(right, [1] * len(right), 0, "") | about
        _, choices, gold = zip(*(question for _, _, question in rows))
        names = [name.strip() for name in choices[0]] if len(set(choices)) == 1 else None
        sizes = [[len(choice.strip()) for choice in row] for row in choices]
        return multiple_choice(values, sizes, gold, names) | about

    return measure


# ---- The report

# the main numbers of a part
MAIN = ("bits_per_byte", "word_perplexity", "token_perplexity", "perplexity")
MAIN += ("accuracy", "accuracy_norm", "score", "eos_rate")


def parts_of(results):
    """Returns {"perplexity", "boolq", "tasks.NAME", "smoke": part}."""
    tasks = {f"tasks.{Path(path).name}": part for path, part in results["tasks"].items()}
    parts = {"perplexity": results["perplexity"], "boolq": results["boolq"]}
    return parts | tasks | {"smoke": results["smoke"]}


def main_numbers(results):
    """Returns {"perplexity.bits_per_byte": number, ...}: by their places in results.json."""
    parts = parts_of(results).items()
    numbers = {f"{name}.{key}": part.get(key) for name, part in parts for key in MAIN}
    return {place: number for place, number in numbers.items() if number is not None}


def shown_number(place, number):
    if number is None:
        return "not measured"
    is_share = place.endswith(("accuracy", "accuracy_norm", "eos_rate"))
    return f"{number:.1%}" if is_share else f"{number:,.5g}"


def aligned(rows):
    """Returns rows of texts as lines with straight columns."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def headline(results):
    """Returns the main numbers, and a verdict on each part that was asked for."""
    numbers = main_numbers(results).items()
    lines = [aligned([[place, shown_number(place, number)] for place, number in numbers]), ""]
    for name, part in [*parts_of(results).items()][:-1]:  # the smoke prompts have no verdict
        reason = f": {part['reason']}" if "reason" in part else ""
        interval = "; 95% {:.1%} to {:.1%}".format(*part["ci95"]) if "ci95" in part else ""
        lines.append(f"{name}: {part['verdict']}{reason}{interval}")
    return "\n".join(lines)


def report_text(results, detailed=False):
    """Returns report.md: the headline and all of results.json; `detailed` adds the responses."""
    smoke = dict(results["smoke"])
    responses = smoke.pop("responses")
    facts = json.dumps(results | {"smoke": smoke}, indent=2, ensure_ascii=False)
    fast = "; fast mode: parts of the data only" if results["protocol"]["fast_mode"] else ""
    parts = [f"# {results['model']['name']}: evaluation{fast}"]
    parts += [f"```text\n{headline(results)}\n```", f"## All numbers\n\n```json\n{facts}\n```"]
    for row in responses if detailed else ():
        scores = ", ".join(f"{name} {value}" for name, value in row["parts"].items())
        parts += [f"## {row['category']}: {row['score']:.2f}", indent(row["prompt"], "> ")]
        parts += [indent(row["response"], "    "), f"{scores}, finish {row['finish']}"]
    return "\n\n".join(parts) + "\n"


# ---- Results side by side, and beside what is expected of a size


@dataclass(frozen=True)
class ResultsConfig:
    """Of `compare` and `assess`."""

    files: tuple[str, ...]  # results.json of evaluations, or their folders


def read_results(path, exit_code=2):
    """Returns the results in a file, or in a folder's results.json; UserError if they are none."""
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    with refusing(Exception, f"{path}: not whole results of eval.py", "run it again", exit_code):
        results = config.read_object(path)
        report_text(results), math.log(results["model"]["non_embedding"])
    return results


# places in results.json: numbers compare where these are equal
BASIS = [("model", "tokenizer_sha256"), ("perplexity", "text"), ("perplexity", "context")]
BASIS += [("perplexity", "stride"), ("boolq", "n")]


def shown_basis(value):
    if isinstance(value, dict):  # a text, or the part of it that fast_mode takes
        return f"{value['sha256'][:12]}, {value['part']}"
    return str(value)[:12]


def compare(cfg):
    """Several models side by side: python eval.py compare A.json B.json ... (or their folders)

    Numbers compare where the last lines are the same, those per token only with one tokenizer.
    """
    models = [read_results(file) for file in cfg.files]
    rows, numbers = [["", *cfg.files]], [main_numbers(results) for results in models]
    for place in dict.fromkeys(chain.from_iterable(numbers)):
        rows.append([place, *(shown_number(place, values.get(place)) for values in numbers)])
    for part, key in BASIS:
        values = [shown_basis(results[part].get(key)) for results in models]
        rows.append([f"{part}.{key}", *values, *["DIFFERENT"] * (len(set(values)) > 1)])
    print(aligned(rows))


ADVICE = """
A perplexity above its range: train longer while the validation loss falls, then on more text.
Low smoke scores: fine-tune (sft.py) on varied answers that end; read the responses in report.md."""


def assess(cfg):
    """One model beside what is expected of its size: python eval.py assess results.json (or folder)

    Ranges are those of configs/eval/expected.json, each with its source.
    Exits with 1 if the results cannot be read.
    """
    if len(cfg.files) != 1:
        raise UserError("assess needs one file of results: python eval.py assess results.json")
    results = read_results(*cfg.files, exit_code=1)
    count = results["model"]["non_embedding"]
    sizes = config.read_object(CONFIGS / "expected.json")["sizes"]
    size = min(sizes, key=lambda size: abs(math.log(count / sizes[size]["non_embedding"])))
    rows = [["metric", "value", "expected", "verdict", "source"]]
    for entry in sizes[size]["ranges"]:
        places = [place for place in entry if place not in ("source", "text")]
        rows += [judged(place, results, entry, *entry[place]) for place in places]
    title = f"size class {size}: {count:,} parameters, {len(rows) - 1} ranges are known"
    print(title, "", aligned(rows), "", headline(results), ADVICE, sep="\n")


def judged(place, results, entry, low, high):
    """Returns a row: the place, its number, the range, a verdict in words, the range's source."""
    number, verdict = main_numbers(results).get(place), "within"
    text = results["perplexity"].get("text", {}).get("name") or "another text"
    if number is None:
        verdict = "not measured"
    elif place.startswith("perplexity") and not text.startswith(entry.get("text", "")):
        verdict = f"not comparable: measured on {text}"
    elif not low <= number <= high:
        verdict = "below" if number < low else "above"
    expected = f"{shown_number(place, low)} to {shown_number(place, high)}"
    return [place, shown_number(place, number), expected, verdict, entry.get("source", "")]


if __name__ == "__main__":
    commands = {"compare": (compare, ResultsConfig), "assess": (assess, ResultsConfig)}
    config.dispatch(commands, sys.argv[1:], __doc__, default=(main, EvalConfig))
