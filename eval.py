"""What a model is worth, in numbers that can be compared: perplexity, questions, smoke prompts.

    python eval.py --model_path=checkpoints/pretrain/tiny/final --output_dir=evaluation_results/tiny
    python eval.py compare evaluation_results/a evaluation_results/b
    python eval.py assess evaluation_results/tiny

Perplexity of a text (WikiText-2, if no other is named): every token is predicted once, in windows of
`context` tokens that move on by `stride`. Questions are answered by likelihood: BoolQ, and any file of
{context, choices, answer} or {text}, whose last word is asked for. Prompts are answered by generation
(smoke.py). Every number comes with its count, its baselines and how it was measured: results.json for
programs, report.md for people (assess.py). What is not at hand is "not measured", never 0.
"""

import gzip
import hashlib
import json
import lzma
import math
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from tqdm import tqdm

import smoke
from assess import assess, compare, draw, headline, markdown
from corpus.chats import BadRow, reasons_of, usable_rows
from corpus.files import kind_of, text_of
from corpus.sources import Tally, Unreachable, rows_of
from lib.config import PositiveInt, Range, UserError, run, shown
from lib.runtime import tune_cpu
from model import count_parameters, identify
from sample import open_model
from scoring import (
    accuracy,
    answer_scores,
    cores,
    multiple_choice,
    perplexity,
    rates,
    score,
    text_batches,
    unigram_nats,
    windows,
)


@dataclass(frozen=True)
class EvalConfig:
    """What to measure, on what, and how."""

    model_path: str  # a model or adapter folder, or that of a whole training
    output_dir: str = "evaluation_results"  # results.json, report.md and report.png go here
    perplexity_path: str = "hf:Salesforce/wikitext:wikitext-2-raw-v1:test"  # a text file, or hf:
    boolq_path: str = "hf:google/boolq::validation"  # a file of {question, passage, answer}, or hf:
    tasks: tuple[
        str, ...
    ] = ()  # files of {context, choices, answer} or {text}, separated by commas, or hf:
    # smoke prompts of your own: .json, .jsonl, or .txt with one a line
    custom_prompts: str | None = None
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
    # of weights; 16 bits are faster and a little less exact
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"


FAST_BYTES, FAST_QUESTIONS = 100_000, 100


def main(cfg):
    began, out = time.monotonic(), Path(cfg.output_dir)
    make_folder(out)
    tune_cpu()
    model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype)
    # everything is read and checked before anything is measured: a typing error must not cost an hour
    prompts = smoke.load_prompts(cfg.custom_prompts, cfg.fast_mode)
    text = take("perplexity_path", cfg.skip_perplexity, prepare_text, cfg, model, tokenizer)
    boolq = take("boolq_path", cfg.skip_boolq, prepare_task, cfg, cfg.boolq_path, model, tokenizer)
    tasks = {
        path: take("tasks", False, prepare_task, cfg, path, model, tokenizer) for path in cfg.tasks
    }
    say(f"{len(prompts)} smoke prompts")
    answers = smoke.run(model, tokenizer, prompts, cfg.max_new_tokens, cfg.seed)
    results = {
        "model": describe(cfg, model, tokenizer),
        "protocol": protocol(cfg, model),
        "perplexity": text if missing(text) else text_result(cfg, model, tokenizer, text),
        "boolq": boolq if missing(boolq) else task_result(cfg, model, boolq),
        "tasks": {
            path: task if missing(task) else task_result(cfg, model, task)
            for path, task in tasks.items()
        },
        "smoke": answers,
    }
    results["protocol"]["seconds"] = round(time.monotonic() - began, 1)
    write(cfg, out, results)


def say(text):
    print(text, file=sys.stderr, flush=True)


def take(flag, skipped, prepare, *arguments):
    """Returns what `prepare` does, or the result of a part that is not measured."""
    if skipped:
        return {"verdict": "not measured", "reason": "skipped, as asked"}
    try:
        return prepare(*arguments)
    except Unreachable as problem:
        reason = f"{problem}; --{flag}=FILE takes one of yours"
        say(f"not measured: {reason}")
        return {"verdict": "not measured", "reason": reason}


def missing(part):
    return isinstance(part, dict)


def finite(nats, cfg):
    """Returns `nats`; UserError if they are none, before they are written as numbers."""
    if not math.isfinite(nats):
        raise UserError(
            f"{cfg.model_path}: its likelihoods overflow in {cfg.dtype}; use --dtype=fp32"
        )
    return nats


def describe(cfg, model, tokenizer):
    """Returns what a reader of results must know of the model."""
    shape, counts = model.cfg, count_parameters(model.cfg)
    return {
        "path": cfg.model_path,
        "name": shape.model_name,
        "sha256": identify(cfg.model_path).sha256,
        "parameters": counts["total"],
        "non_embedding": counts["non_embedding"],
        "shape": {
            key: getattr(shape, key) for key in ("n_layer", "d_model", "n_head", "kv_heads", "d_ff")
        },
        "sequence_length": shape.sequence_length,
        "vocab_size": shape.vocab_size,
        "tokenizer_sha256": tokenizer.sha256,
        "template": tokenizer.template,
    }


def protocol(cfg, model):
    """Returns how the numbers were measured, in the words of report.md."""
    return {
        "perplexity": "every token once, the first after BOS; windows of `context` tokens move by `stride`; "
        "bytes are those of the text in UTF-8; words are separated by whitespace, as lm-eval counts them; "
        "line ends are not words (the published counts of WikiText add one per line)",
        "baselines": "uniform: every token equally likely; unigram: token frequencies of this very text, so "
        "the best any model without context could do; gzip -9 and xz -6 of its bytes",
        "questions": "answers compared by log-likelihood after BOS and the context, tokenized as in lm-eval; "
        "accuracy_norm: per character; a context too long loses its beginning; no template, no examples",
        "boolq": "PASSAGE, 'Question: QUESTION?', 'Answer:', followed by ' no' or ' yes' (as lm-eval)",
        "calibrated_accuracy": "the mean log-odds over all questions is taken off each (after Batch "
        "Calibration, Zhou et al. 2024): what is left when the liking for one answer is gone",
        "ci95": "Wilson's interval; the verdict asks whether the baseline lies inside",
        "fast_mode": cfg.fast_mode,
        "seed": cfg.seed,
        "device": model.lm_head.weight.device.type,
        "dtype": cfg.dtype,
    }


def rows_at_once(cfg, model, context):
    return cfg.batch_size or max(
        1, (2048 if model.lm_head.weight.device.type == "cpu" else 32768) // context
    )


# ----------------------------------------------------------------------------------------------
# Perplexity

# sha256 of files everybody has
KNOWN_TEXTS = {
    "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7": "WikiText-2 raw, validation",
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08": "WikiText-2 raw, test",
}


class Text(NamedTuple):
    """A text to be scored, its ids, and how it is cut into windows."""

    about: dict
    text: str
    ids: list[int]
    context: int
    stride: int


def prepare_text(cfg, model, tokenizer):
    """Reads and encodes cfg.perplexity_path. UserError for one that cannot be scored as asked."""
    limit = model.cfg.sequence_length
    context = cfg.context or limit
    if context > limit:
        raise UserError(f"context {context} is more than the {limit} positions of the model")
    stride = cfg.stride or (context if cfg.fast_mode else max(1, context // 2))
    if stride > context:
        raise UserError(f"stride {stride} is more than context {context}: it would skip tokens")
    text = read_text(cfg.perplexity_path)
    raw = text.encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    about = {
        "path": cfg.perplexity_path,
        "name": KNOWN_TEXTS.get(sha256),
        "sha256": sha256,
        "part": "all",
    }
    if cfg.fast_mode and len(raw) > FAST_BYTES:
        text = beginning(text, FAST_BYTES)
        about["part"] = f"the first {len(text.encode()):,} of {len(raw):,} bytes"
    ids = tokenizer.encode(text)
    if len(ids) < context:
        raise UserError(
            f"{cfg.perplexity_path}: {len(ids)} tokens are fewer than the context of {context}; "
            f"give a longer text, or --context={len(ids)} or less"
        )
    return Text(about, text, ids, context, stride)


def read_text(path):
    """Returns a text as it is, to the byte; the rows of a table or of the hub are joined by blank lines.

    The hub keeps WikiText's lines as rows, and blank ones as empty texts: together they give the file again.
    Raises UserError for what is missing, empty or not UTF-8.
    """
    hub = path.startswith("hf:")
    if not hub and not Path(path).is_file():
        raise UserError(f"{path}: not found; give a text file, or hf:owner/name:config:split")
    if hub:
        say(f"fetching {path}")
    if hub and "wikitext" in path.lower():
        text = "".join(line or " \n" for line in row_texts(path))
    elif hub or kind_of(Path(path)) in ("json", "jsonl", "csv"):
        text = "\n\n".join(row_texts(path))
    else:
        text = text_of(Path(path))
    if not text.strip():
        raise UserError(f"{path}: holds no text to score")
    return text


def row_texts(path):
    """Yields the "text" of each row; UserError for a row without one."""
    tally = Tally()
    for where, row in rows_of(path, tally):
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
            raise UserError(
                f'{where}: expected an object with a "text" of whole Unicode characters'
            )
        yield text
    if tally.bad_rows:
        raise UserError(f"{path}: {tally.bad_rows} rows cannot be read{reasons_of(tally, path)}")


def beginning(text, size):
    """Returns the first lines of a text, at most `size` bytes of UTF-8; of a first line too long a part."""
    part = text.encode()[:size].decode("utf-8", "ignore")
    return part[: part.rfind("\n") + 1] or part


def text_result(cfg, model, tokenizer, text):
    """Returns the "perplexity" of results.json."""
    context, stride, size = text.context, text.stride, len(text.text.encode())
    rows, device = rows_at_once(cfg, model, context), model.lm_head.weight.device
    batches = text_batches(text.ids, tokenizer.bos_id, context, stride, rows, device)
    steps = math.ceil(sum(1 for _ in windows(len(text.ids), context, stride)) / rows)
    bar = tqdm(batches, desc="perplexity", total=steps, unit=" batches", disable=None)
    nats, tokens, _ = score(model, bar, tokenizer.token_bytes(), cores(model))
    words = (
        sum(1 for _ in re.finditer(r"\s+", text.text)) + 1
    )  # len(re.split(...)), without the list
    result = rates(finite(nats, cfg), tokens, words, size)
    result |= {"bytes_per_token": size / tokens, "nats": nats, "tokens": tokens, "words": words}
    result |= {"lines": text.text.count("\n"), "bytes": size, "context": context, "stride": stride}
    baselines = {
        name: rates(value, tokens, words, size)
        for name, value in baseline_nats(text, tokenizer).items()
    }
    lossless = tokenizer.decode(text.ids) == text.text
    told = text_verdict(result["bits_per_byte"], baselines, lossless)
    return result | {
        "text": text.about,
        "lossless": lossless,
        "baselines": baselines,
        "verdict": told,
    }


def baseline_nats(text, tokenizer):
    """Returns what others spend on a text, in nats: models that know nothing, and compressors."""
    raw, bits = text.text.encode(), 8 * math.log(2)
    return {
        "uniform": len(text.ids) * math.log(tokenizer.vocab_size),
        "unigram": unigram_nats(text.ids),
        "gzip": bits * len(gzip.compress(raw, 9, mtime=0)),
        "xz": bits * len(lzma.compress(raw)),
    }


def text_verdict(bits, baselines, lossless):
    beaten = [name for name, value in baselines.items() if bits < value["bits_per_byte"]]
    others = [name for name in baselines if name not in beaten]
    words = f"better than {', '.join(beaten)}" if beaten else "better than no baseline"
    if beaten and others:
        words += f"; not better than {', '.join(others)}"
    return words if lossless else f"{words}; too low: the tokenizer loses parts of this text"


# ----------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    """A context and its answers, each with the space that parts them; `answer` is the right one's index.

    `kept`: the end of the context that must never be cut off.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    kept: str = ""


class Task(NamedTuple):
    """Questions of one file, encoded: `encoded` is [(context ids, [answer ids, ...])]."""

    kind: str
    questions: list[Question]
    encoded: list
    about: dict


def prepare_task(cfg, path, model, tokenizer):
    """Reads, draws and encodes the questions of a file. UserError for a row that is none."""
    if not path.strip():
        raise UserError("tasks: an empty path; give files separated by commas")
    if path.startswith("hf:"):
        say(f"fetching {path}")
    rows = usable_rows(path, to_question, max_bad=0)
    kinds = {kind for _, kind, _ in rows}
    if len(kinds) > 1:
        raise UserError(
            f"{path}: holds {' and '.join(sorted(kinds))} rows; give one file for each kind"
        )
    if path == cfg.boolq_path and kinds != {"boolq"}:
        raise UserError(
            f"{path}: expected {{question, passage, answer}} rows; others go to --tasks"
        )
    total, limit = len(rows), FAST_QUESTIONS if cfg.fast_mode else len(rows)
    limit = (path == cfg.boolq_path and cfg.max_boolq_samples) or limit
    if limit < total:
        rows = [rows[at] for at in sorted(random.Random(cfg.seed).sample(range(total), limit))]
    encoded, cut = encode_questions(tokenizer, rows, model.cfg.sequence_length)
    about = {"path": path, "rows": total, "cut": cut}
    return Task(kinds.pop(), [question for _, _, question in rows], encoded, about)


def to_question(row):
    """Returns (kind, Question) of a row; raises chats.BadRow."""
    if not isinstance(row, dict):
        raise BadRow("not-an-object", f"expected an object, got {shown(row)}")
    if "choices" in row:
        return "multiple-choice", to_choices(row)
    if "question" in row or "passage" in row:
        return "boolq", to_boolq(row)
    if "text" in row:
        context, space, word = text_field(row, "text").strip().rpartition(" ")
        if not space or not context.strip():
            raise BadRow("one-word", '"text" must hold a last word and what comes before it')
        return "last-word", Question(context, (" " + word,), 0)
    found = ", ".join(map(str, row)) or "none"
    expected = "{question, passage, answer}, {context, choices, answer} or {text}"
    raise BadRow("unknown-row", f"expected {expected}, found the fields {found:.80}")


def to_boolq(row):
    """The prompt of lm-eval's task boolq."""
    question, passage = text_field(row, "question"), text_field(row, "passage")
    answer = row.get("answer", row.get("label"))
    known = {True: 1, False: 0, "yes": 1, "no": 0, "true": 1, "false": 0}
    answer = answer.lower() if isinstance(answer, str) else answer
    answer = known.get(answer) if isinstance(answer, (str, int)) else None
    if answer is None:
        raise BadRow("no-answer", '"answer" must be true or false')
    kept = f"\nQuestion: {question}?\nAnswer:"
    return Question(passage + kept, (" no", " yes"), answer, kept)


def to_choices(row):
    context, choices, answer = (
        text_field(row, "context", empty=True),
        row["choices"],
        row.get("answer"),
    )
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(smoke.is_text, choices)):
        raise BadRow("no-choices", '"choices" must be a list of at least two texts')
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise BadRow("no-answer", f'"answer" must be one of the choices or 0..{len(choices) - 1}')
    joint = "" if context[-1:].isspace() else " "
    return Question(context, tuple(c if c[0].isspace() else joint + c for c in choices), answer)


def text_field(row, name, empty=False):
    value = row.get(name)
    if not (smoke.is_text(value) or (empty and isinstance(value, str) and not value.strip())):
        raise BadRow(f"missing-{name}", f'"{name}" must be a text')
    return value


def encode_questions(tokenizer, rows, positions):
    """Returns ([(context ids, [answer ids, ...])], how many contexts lost their beginning).

    As lm-eval: the ids of an answer are what it adds to those of the context, whose last blanks go to it.
    """
    pairs = []
    for _, _, question in rows:
        context = question.context.rstrip()
        blanks = question.context[len(context) :]
        pairs.append([context, *(context + blanks + choice for choice in question.choices)])
    flat = iter(
        tokenizer.encode_batch([text for texts in pairs for text in texts], os.cpu_count() or 1)
    )
    encoded, cut = [], 0
    for (where, _, question), texts in zip(rows, pairs):
        context, *wholes = (next(flat) for _ in texts)
        answers = [whole[len(context) :] for whole in wholes]
        if not all(answers):
            raise UserError(
                f"{where}: an answer adds no token to its context; put a line break between them"
            )
        room = positions - max(map(len, answers))  # BOS, context and all but an answer's last token
        needed = len(tokenizer.encode(question.kept)) if len(context) > room else 0
        if room < max(1, needed):
            raise UserError(
                f"{where}: question and answer do not fit the {positions} positions of the model"
            )
        cut += len(context) > room
        encoded.append(([tokenizer.bos_id, *context[-room:]], answers))
    return encoded, cut


def task_result(cfg, model, task):
    """Returns what results.json says of a task."""
    context = model.cfg.sequence_length
    budget = context * rows_at_once(cfg, model, context)
    say(f"{len(task.questions):,} questions of {task.about['path']}")
    scores = answer_scores(model, task.encoded, budget, cores(model))
    rows = [[value for value, _ in row] for row in scores]
    finite(sum(map(sum, rows)), cfg)
    if task.kind == "last-word":
        right = [int(greedy) for ((_, greedy),) in scores]
        words = {"perplexity": perplexity(-sum(map(sum, rows)), len(rows))}
        words["verdict"] = "right where every token of the last word is the likeliest"
        return accuracy(right, [1] * len(right)) | words | task.about
    choices = [question.choices for question in task.questions]
    names = [name.strip() for name in choices[0]] if len(set(choices)) == 1 else None
    sizes = [[len(choice.strip()) for choice in row] for row in choices]
    return (
        multiple_choice(rows, sizes, [question.answer for question in task.questions], names)
        | task.about
    )


# ----------------------------------------------------------------------------------------------
# What is left behind


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"output_dir {out}: cannot be made ({problem.strerror}); name another"
        ) from None


def write(cfg, out, results):
    """Writes results.json, whole or not at all, report.md and, with matplotlib, its picture."""
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    part = out / f".results.json.{os.getpid()}.tmp"
    part.write_text(text, encoding="utf-8")
    os.replace(part, out / "results.json")
    picture = draw(results, out / "report.png")
    (out / "report.md").write_text(
        markdown(results, smoke.table(results["smoke"]), cfg.detailed_output, picture),
        encoding="utf-8",
    )
    print(headline(results))
    print(f"\n{out / 'results.json'}, {out / 'report.md'}")


# ----------------------------------------------------------------------------------------------
# The command line


@dataclass(frozen=True)
class CompareConfig:
    """Nothing to choose."""


@dataclass(frozen=True)
class AssessConfig:
    """What a model is held against."""

    expected: str = str(
        Path(__file__).parent / "configs" / "eval" / "expected.json"
    )  # ranges by size


def command_line(argv):
    """Measures, unless the first word asks for something else."""
    word, files = argv[0] if argv else "", [w for w in argv[1:] if not w.startswith("-")]
    flags = [w for w in argv[1:] if w.startswith("-")]
    if word == "compare":
        run(
            lambda cfg: print(compare(files)),
            CompareConfig,
            argv=flags,
            doc=cleandoc(compare.__doc__),
        )
    elif word == "assess":
        try:
            run(
                lambda cfg: print(assess(files, cfg.expected)),
                AssessConfig,
                argv=flags,
                doc=cleandoc(assess.__doc__),
            )
        except SystemExit as end:  # 2 elsewhere; whoever scripts this one was promised 1
            sys.exit(1 if end.code == 2 else end.code)
    else:
        run(main, EvalConfig, __doc__, argv=argv)


if __name__ == "__main__":
    command_line(sys.argv[1:])
