"""Smoke test of what a model writes: prompts of eight kinds, each response scored 0 to 1 by plain counts.

    score = form * (0.4 + 0.6 * order * content)
    form  = order * english * repetition * length * (0.7 + 0.3 * completeness)

No model judges here: every part is counted on the response's words, stands in the result, and can be redone
by hand. `form` asks whether this is language, `content` whether it answers. So text that is fluent and beside
the point gets 0.4 at most, and what is right counts as far as it is language. Empty text is 0.

    order         do the words follow each other as in English? The mean over neighbours of ln(how often such
                  a pair stands in English / how often in shuffled English), from PAIRS, below, with a credit
                  of 6 pairs of 0.25; / 0.25, from 0.1 to 1. A word right after itself counts -3.
    english       (1 + function words) / (words / 4), at most 1, times the share of the characters that stand
                  in words of a-z, numbers or punctuation
    repetition    share of the words that are not repeated, / 0.9, at most 1. Repeated: the second word of a
                  pair that stood before, or the same word again.
    length        own words / the prompt's min_words (or 4), at most 1; a right answer may be as short as it
                  likes. Runs of five words of the prompt, or all of it, are not its own.
    completeness  1 if it ends a sentence, or ends by itself with a line of up to 5 words; else by itself
                  0.5, on a word like "the" 0; cut off, the share of it up to the last end of a sentence
    relevance     keywords among its own words / 3, at most 1; without keywords, words of the prompt / 2
    answer        1 or 0 by the prompt's check, in a regex on its first 30 own words; none without a check

`content` is the relevance; with a check 1 for the right answer, 0.3 * relevance for a wrong one.

The limits. It tells broken from working, not good from better: invented words in good order, nonsense that is
grammatical and wrong facts that no check asks for pass; English only. One text alone may be misjudged: of
right answers with their words shuffled 7% stayed above fluent text beside the point, 3% where they had twelve
words or more. Another seed moved the mean of the same model by 0.007 (base) and 0.025 (after SFT), of the
quick prompts by twice that (standard deviations of 5 seeds, models of 2.6 M parameters). Compare models by
loss and by tasks; read the responses, which is what this is for.
"""

import re
import time
import zlib
from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from corpus.samples import passes
from lib.config import UserError, closest, did_you_mean, parse_json, shown
from lib.tokenizer import render, stop_ids
from sample import Request, Sampling, generate

PROMPTS = Path(__file__).parent / "configs" / "eval" / "smoke_prompts.json"
SAMPLING = Sampling(
    temperature=0.5, top_p=0.95, top_k=0
)  # cooler, a base model goes round in circles
BATCH = 64  # prompts decoded together
HEAD = 30  # words in which a right answer has to come

# ---- prompts

CHECKS = ("exact", "word", "number", "overlap", "regex")  # but for regex those of starter.passes


def is_text(value):
    """Is it a text with something in it, of whole Unicode characters?"""
    return (
        isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)
    )


def _is_check(value):
    if (
        not isinstance(value, dict)
        or value.get("kind") not in CHECKS
        or not is_text(value.get("answer"))
    ):
        return False
    if value["kind"] == "overlap":
        share = value.get("share")
        return type(share) in (int, float) and 0 < share <= 1
    try:
        return value["kind"] != "regex" or re.compile(value["answer"]) is not None
    except re.error:
        return False


FIELDS = {
    "prompt": (is_text, "a text"),
    "base": (is_text, "the text that a model without a chat template is to continue"),
    "category": (is_text, "a text"),
    "check": (
        _is_check,
        f'an object {{"kind": one of {", ".join(CHECKS)}, "answer": a text}} ("share": 0..1 for overlap)',
    ),
    "keywords": (lambda v: isinstance(v, list) and v and all(map(is_text, v)), "a list of words"),
    "min_words": (lambda v: type(v) is int and 1 <= v <= 1000, "1..1000"),
    "quick": (lambda v: type(v) is bool, "true or false"),
}


def load_prompts(path=None, fast=False):
    """Reads prompts, by default our 40; with `fast` those marked "quick" (10 of ours), or all if none is.

    A file is .json (a list), .jsonl (one a line) or .txt (a prompt a line). Rows are objects {"prompt"} with
    any of FIELDS, or just texts; keys that are none of ours are left alone. Raises UserError naming file, row
    and what was expected.
    """
    path = Path(path or PROMPTS)
    prompts = [_row(row, where) for where, row in _rows(path)]
    if not prompts:
        raise UserError(
            f"{path}: holds no prompt; write one a line (.txt), or a list of objects (.json)"
        )
    return [prompt for prompt in prompts if fast and prompt.get("quick")] or prompts


def _rows(path):
    """Yields (where, JSON value or text) of each row."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name a .json, .jsonl or .txt file of prompts"
        ) from None
    if path.suffix == ".json":
        rows = parse_json(text, path)
        if not isinstance(rows, list):
            raise UserError(f'{path}: must be a list [{{"prompt": ...}}, ...], got {shown(rows)}')
        yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))
    elif path.suffix in (".jsonl", ".txt"):
        for number, line in enumerate(text.split("\n"), start=1):
            where = f"{path} row {number}"
            if line.strip():
                yield where, parse_json(line, where) if path.suffix == ".jsonl" else line.strip()
    else:
        raise UserError(
            f"{path}: prompts are read from .json, .jsonl and .txt files, not {path.suffix!r}"
        )


def _row(row, where):
    """Returns a prompt with its category, its fields checked."""
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise UserError(f'{where}: must be an object {{"prompt": ...}} or a text, got {shown(row)}')
    if "prompt" not in row:
        raise UserError(f"{where}: has no 'prompt'; keys found: {', '.join(row) or 'none'}")
    for key, value in row.items():
        if key in FIELDS and not FIELDS[key][0](value):
            raise UserError(f"{where}: {key} must be {FIELDS[key][1]}, got {shown(value)}")
        if key not in FIELDS and closest(key, FIELDS, cutoff=0.8):
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, FIELDS)}")
    return {"category": "custom"} | {key: value for key, value in row.items() if key in FIELDS}


# ---- words and their order

TYPEWRITER = str.maketrans(
    dict(zip("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")) | {"\u2026": "..."}
)
TOKEN = re.compile(r"[^\W\d_]+(?:['.][^\W\d_]+)*|\d+(?:[.,:]\d+)*|\S")
ITEM = re.compile(
    r"^[ \t]*(?:\d{1,3}[.)]|[-*])[ \t]+", re.MULTILINE
)  # what opens an item of a list
BREAK = re.compile(r"\n(?=[ \t]*(?:\n|[A-Z]))")  # a line break that may end a sentence
SENTENCE = re.compile(r"[.!?][\"')*]*(?=\s|$)")  # where one ends
QUOTED = re.compile(
    r"(?<!\w)[\"'][^\"'.!?\n]{1,40}[.!?]?[\"'](?!\w)"
)  # a few words that are spoken about
PLAIN = re.compile(r"[A-Za-z'.]{1,20}|[\d.,:]{1,12}|[-.!?,;:\"'()]")
SILENT = set("\"'()`*-")

FUNCTION_WORDS = {
    "the": "the a an my your his its our their every",
    "this": "this that these those all some any each both another",
    "in": "of in on at by with from for into during against upon toward towards until since per onto without",
    "over": "over under about between through before after across among around behind near within along",
    "to": "to",
    "and": "and or but nor",
    "if": """if because when while although though where whether unless than as who which how why whose
        what""",
    "I": "i he she we they",
    "it": "you it there her him me us them",
    "is": "is are was were be been being am isn't aren't wasn't weren't",
    "has": "has have had do does did don't doesn't didn't haven't hasn't hadn't",
    "can": "can could will would may might must shall should can't cannot won't wouldn't couldn't shouldn't",
    "not": "not also only very too so then just still even often always never now more most much many",
}
KIND = {word: kind for kind, words in FUNCTION_WORDS.items() for word in words.split()}
SHORT = {"ll": "can", "d": "can", "ve": "has", "m": "is", "re": "is", "s": "is"}  # we'll, I'm
DANGLING = {word for kind in ("the", "in", "to", "and") for word in FUNCTION_WORDS[kind].split()}

# 10 ln(how often a word of the row's kind is followed by one of the column's / how often by chance), from -30
# to 10 (a pair that is right is little evidence, one that is wrong is much), in speeches, web pages and
# encyclopedia articles. Kinds: the function words above; words in -ed and in -s; Tom, any other word written
# large inside a sentence; cat, all other words; comma; end of a sentence; and ^, the capital that opens one.
# What cannot be told is left out: numbers, and the opening word of a sentence, which may be a name or not. A
# pair with any other sign counts -10.
PAIRS = """
    the this  in over  to and  if   I  it  is has can not -ed  -s Tom cat   ,   .   ^
the -30 -30 -30 -30 -30 -30 -30 -30 -30 -30 -30 -21  -2  -6   6   7   9 -30 -30 -30
this  -2  -1  -5  -2 -22 -25   2  10   2   7   2   7  -5  -3   8  -3   3 -10 -13 -30
 in  10   9 -30 -14 -30 -30  -4 -23   3 -30 -30 -30  -7 -15  -2   6   1 -30 -30 -18
over  10   5 -11 -21  -6 -19   0  -3  10 -20 -19 -26  -9 -16  -2   2  -3 -14  -5 -14
 to   6   2 -30 -20 -30 -30 -11 -30   3   6   6 -30  -8 -17  -9  -5   8 -30 -30 -23
and   3   1  -6  -4  -1 -30   0   8   2  -8  -3  -4   7   4   3   1   3 -19 -30 -30
 if   7   3 -10 -12  -6 -30 -17  10  10   6   9   8   1   2   0  -3  -3 -14 -30 -28
  I -30 -17 -30 -30 -30 -29 -27 -30 -30  10  10  10   3  10 -10 -30   1 -25 -29 -30
 it -13  -2  -4  -2   6  -6   0 -20 -19  10  10  10   1  -3   0 -17  -5   1   6 -30
 is   5  -4 -10   1  -4 -24  -8 -24 -16 -22 -30 -30  10  10 -12 -18   1 -17 -19 -30
has   1  -1 -17  -8   1 -28 -15  -6  -2  10   2 -30  10  10 -16 -28  -2 -17 -12 -30
can -30 -14 -21 -19 -19 -17 -29  -2 -12  10  10 -30  10 -15 -22 -30   6 -15 -24 -30
not  -7  -4  -2   2   0  -9   6  -6  -7   1   3  -9   8  10   1 -15   3  -1  -4 -30
-ed   1   2  10   9  10  -2   2 -24   3 -22 -26 -21  -1 -22  -2  -6  -5  -1   2 -30
 -s -10   1   9   7   5   7   3  -9  -5   3   3   3  -4  -2  -9 -17  -7  10  10 -30
Tom -24 -18  -1  -7  -6   3  -6 -20 -25   1   3  -3 -12  -1  -4  10  -7  10   8 -11
cat  -5   0   6   4   6   3   1 -11  -1  -2  -4  -2  -7  -6   4  -9  -1   6   6 -30
  ,   0  -2  -4   1  -2  10  10  10   4  -7  -6  -7   4  -1  -5   4  -3 -27 -20 -11
  . -30 -30 -30 -30 -30 -30 -30   6 -30 -30 -30 -30 -30 -30 -30 -30 -30 -24 -30  10
  ^  10  10   5  10  -3   6  10  10  10 -18 -12  -5   5 -30 -30 -30 -30 -30 -30 -30
"""


def _table(text):
    columns, *rows = (line.split() for line in text.strip().splitlines())
    return {
        (row[0], column): int(entry) / 10 for row in rows for column, entry in zip(columns, row[1:])
    }


LOG_ODDS = _table(PAIRS)


def word_spans(text):
    """Returns where the words and numbers of a text stand, [(start, end), ...]."""
    return [match.span() for match in TOKEN.finditer(text) if match[0][0].isalnum()]


def words_of(text):
    """Returns the words and numbers of a text, in small letters."""
    return [text[start:end].lower() for start, end in word_spans(text)]


def kinds_of(text):
    """Returns what PAIRS knows of a text: the kind of each word and sign, in order."""
    text = BREAK.sub(
        " . ", QUOTED.sub("quote", ITEM.sub("", text.lower() if text.isupper() else text))
    )
    kinds = []
    for token in TOKEN.findall(text):
        word = token.lower()
        stem, _, tail = word.partition("'")
        opens = not kinds or kinds[-1] == "."
        large = token[0].isupper() and stem != "i"
        if large and kinds and (opens or stem in KIND):
            kinds.append(
                "^"
            )  # also where a function word is written large inside a sentence: a bad sign
        if word in KIND:
            kinds.append(KIND[word])
        elif stem in KIND and tail in SHORT:
            kinds += [KIND[stem], SHORT[tail]]
        elif token not in SILENT and not (opens and token in ".!?"):
            kinds.append("?" if large and opens else _kind(token, large))
    return kinds


def _kind(token, large):
    if token[0].isdigit():
        return "?"
    if not token[0].isalpha():
        return "." if token in ".!?" else "," if token in ",;:" else "%"
    ends = (("ly", "not"), ("ed", "-ed"), ("s", "-s"))
    return (
        "Tom"
        if large
        else next((kind for end, kind in ends if token.endswith(end) and token[3:]), "cat")
    )


# ---- the parts of a score


def order(text):
    """Returns how English the order of the words is, 0.1..1."""
    kinds, words = kinds_of(text), words_of(text)
    odds = [LOG_ODDS.get(pair, -1.0) for pair in pairwise(kinds) if "?" not in pair]
    odds += [-3.0 for word, after in pairwise(words) if word == after]
    return min(1.0, max(0.1, (sum(odds) + 6 * 0.25) / (len(odds) + 6) / 0.25))


def english(text):
    """Returns whether the words that hold every English text together are there, 0..1."""
    tokens = TOKEN.findall(text)
    plain = sum(len(token) for token in tokens if PLAIN.fullmatch(token)) / sum(map(len, tokens))
    words = [token.lower() for token in tokens if token[0].isalpha()]
    function_words = sum(word in KIND for word in words)
    return plain * min(1.0, 4 * (1 + function_words) / max(1, len(words)))


def repetition(text):
    """Returns 1 for text that goes on saying something new, near 0 for text that goes round."""
    words, seen, new = words_of(text), set(), 0
    for pair in zip([None, *words], words):
        new += pair not in seen and pair[0] != pair[1]
        seen.add(pair)
    return min(1.0, new / len(words) / 0.9)


def completeness(text, finish):
    """Returns 1 for text that comes to an end, less for text that breaks off; see the top of this file."""
    text = text.rstrip()
    ends = [match.end() for match in SENTENCE.finditer(text)]
    if ends and ends[-1] == len(text):
        return 1.0
    if finish != "stop":
        return ends[-1] / len(text) if ends else 0.0
    last = words_of(text.rpartition("\n")[2]) or [""]
    return 0.0 if last[-1] in DANGLING and len(last) > 1 else 1.0 if len(last) <= 5 else 0.5


def own_text(text, source, size):
    """Returns a text without the runs of `size` words that it copies from a source; nothing below three."""
    if size < 3:
        return text
    given, spans = words_of(source.translate(TYPEWRITER)), word_spans(text)
    runs = {tuple(given[at : at + size]) for at in range(len(given) - size + 1)}
    words, copied = [text[slice(*span)].lower() for span in spans], set()
    for at in range(len(words) - size + 1):
        if tuple(words[at : at + size]) in runs:
            copied.update(range(at, at + size))
    edges = [0, *(edge for at in sorted(copied) for edge in spans[at]), len(text)]
    return "".join(text[start:end] for start, end in zip(edges[::2], edges[1::2]))


def relevance(text, prompt):
    """Returns the share of keywords found, of the 3 that are wanted (2 of a prompt that has none, or all)."""
    keywords, wanted = prompt.get("keywords"), 3
    if not keywords:
        keywords, wanted = set(content_words(prompt["prompt"])), 2
    forms = "(?:'?s|es|d|ed|ing|er|ers|y|ly)?"
    text = text.lower()
    found = sum(
        bool(re.search(rf"\b{re.escape(word.lower())}{forms}\b", text)) for word in keywords
    )
    return min(1.0, found / max(1, min(wanted, len(keywords))))


ASKING = """
    write tell say give make name list describe explain answer please question sentence sentences word words
    short one two three"""


def content_words(text):
    """Returns the words of a prompt that its answer may take up, or all where there are none such."""
    words = words_of(text)
    asking = KIND.keys() | set(ASKING.split())
    return [word for word in words if word not in asking and len(word) > 2] or words


def answers(check, text):
    """Is the answer right? A regex is searched, case aside, in the first HEAD words; others take it all."""
    if check["kind"] != "regex":
        return passes(check, text)
    spans = word_spans(text[: 20 * HEAD])
    head = text[: spans[HEAD - 1][1]] if len(spans) > HEAD else text[: 20 * HEAD]
    return re.search(check["answer"], head.strip(), re.IGNORECASE | re.DOTALL) is not None


def score(prompt, response, finish):
    """Returns {"score", "parts"} of a response (all of them explained at the top of this file).

    finish: "stop" if the model ended by itself, anything else if it was cut off.
    """
    parts = dict.fromkeys(
        ("order", "english", "repetition", "length", "completeness", "relevance"), 0.0
    )
    parts["answer"] = 0.0 if "check" in prompt else None
    response = response.translate(TYPEWRITER)
    if not words_of(response):
        return {"score": 0.0, "parts": parts}
    own = own_text(response, prompt["prompt"], min(5, len(words_of(prompt["prompt"]))))
    own = own_text(own, prompt.get("base", ""), 5)
    parts |= {
        "order": order(response),
        "english": english(response),
        "repetition": repetition(response),
    }
    parts["length"] = min(1.0, len(words_of(own)) / prompt.get("min_words", 4))
    parts["completeness"] = completeness(response, finish)
    parts["relevance"] = content = relevance(own, prompt)
    if "check" in prompt:
        parts["answer"] = float(answers(prompt["check"], own))
        parts["length"] = max(parts["answer"], parts["length"])
        content = max(parts["answer"], 0.3 * content)
    form = parts["order"] * parts["english"] * parts["repetition"] * parts["length"]
    form *= 0.7 + 0.3 * parts["completeness"]
    return {"score": form * (0.4 + 0.6 * parts["order"] * content), "parts": parts}


# ---- asking a model


def run(model, tokenizer, prompts, max_new_tokens=64, seed=0):
    """Lets a model answer every prompt and scores what it says; see `score` and the top of this file.

    A model with a chat template is asked `prompt` in that template, any other continues `base`. Each
    response is sampled with a seed made of `seed` and its prompt: neither other prompts nor their order
    change it. Raises UserError for a prompt that fills the context.
    """
    requests = [_request(model, tokenizer, prompt, max_new_tokens, seed) for prompt in prompts]
    start = time.perf_counter()
    for at in range(0, len(requests), BATCH):
        deque(generate(model, requests[at : at + BATCH]), maxlen=0)
    seconds = time.perf_counter() - start
    rows = [_response(tokenizer, *pair) for pair in zip(prompts, requests)]
    categories = {row["category"]: [] for row in rows}
    for row in rows:
        categories[row["category"]].append(row["score"])
    return {
        "score": mean([row["score"] for row in rows]),
        "by_category": {name: mean(scores) for name, scores in categories.items()},
        "eos_rate": mean([row["finish"] == "stop" for row in rows]),
        "distinct_n": {str(n): distinct([row["response"] for row in rows], n) for n in (1, 2)},
        "tokens_per_second": sum(len(request.ids) for request in requests) / seconds,
        "settings": {
            "template": tokenizer.template,  # None: prompts are texts to continue
            "temperature": SAMPLING.temperature,
            "top_p": SAMPLING.top_p,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        "responses": rows,
    }


def asked(prompt, template):
    """Returns the text a model is given: the question, or without a template the text to continue."""
    return prompt["prompt"] if template else prompt.get("base", prompt["prompt"])


def _request(model, tokenizer, prompt, max_new_tokens, seed):
    template, text = tokenizer.template, asked(prompt, tokenizer.template)
    if template:
        messages = [{"role": "user", "content": text}]
        ids = render(tokenizer, messages, template, add_generation_prompt=True)[0]
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    context = model.cfg.sequence_length
    if len(ids) >= context:
        raise UserError(
            f"prompt {shown(text)}: {len(ids)} tokens leave no room in the model's context of {context}; "
            "shorten it"
        )
    sampling = replace(SAMPLING, seed=zlib.crc32(f"{seed} {prompt['prompt']}".encode()))
    return Request(ids, max_new_tokens, sampling, stop_ids(tokenizer, template))


def _response(tokenizer, prompt, request):
    text = tokenizer.decode(request.ids)
    if tokenizer.template:
        text = text.strip()  # a template may leave a space or a line break to the model
    return {
        "prompt": prompt["prompt"],
        "asked": asked(prompt, tokenizer.template),
        "category": prompt["category"],
        "response": text,
        **score(prompt, text, request.finish),
        "finish": request.finish,
    }


def mean(values):
    return sum(values) / len(values)


def distinct(texts, n):
    """Returns distinct word n-grams / words over all texts (distinct-n: Li et al. 2016, arXiv:1510.03055)."""
    texts = [words_of(text) for text in texts]
    grams = {tuple(words[at : at + n]) for words in texts for at in range(len(words) - n + 1)}
    return len(grams) / max(1, sum(map(len, texts)))


def table(result):
    """Returns a markdown table of a result of `run`: scores and mean parts by category."""
    names = list(result["responses"][0]["parts"])
    lines = [f"| | score | {' | '.join(names)} |", f"|---|{'---|' * (len(names) + 1)}"]
    for category in [*result["by_category"], None]:
        rows = [row for row in result["responses"] if category in (row["category"], None)]
        cells = [mean([row["score"] for row in rows])]
        for name in names:
            known = [row["parts"][name] for row in rows if row["parts"][name] is not None]
            cells.append(mean(known) if known else None)
        text = " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells)
        lines.append(f"| {category or 'all'} | {text} |")
    return "\n".join(lines)
