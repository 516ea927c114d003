"""Perplexity of a text and BoolQ: ours against lm-eval's `hf` model on the same folder, in one
process.

    python benchmarks/eval_speed.py --model_path=checkpoints/pretrain/demo/final
    python benchmarks/eval_speed.py --model_path=... --bytes=100000 --questions=100 --rounds=5

Needs lm_eval[hf]. Both get the first `bytes` of a text (windows as long as the model's context, one
after the other) and the first `questions` of BoolQ; encoding is part of it, loading and importing
are not. lm-eval runs at its default batch of 1 and at others; rounds alternate in reverse order.
The same numbers must come out: BOS is written as <s> before lm-eval's contexts, because its hf
model adds none. One JSON line is printed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from corpus.sources import usable_rows
from eval import answer_scores, encode_questions, text_nats, to_question
from lib.runtime import tune_cpu
from sample import open_model

DATA = ROOT.parent / "shared" / "data"


class Ours:
    def __init__(self, folder):
        self.model, self.tokenizer = open_model(folder, "cpu", "fp32")
        self.context = self.model.cfg.sequence_length
        self.rows = max(1, 2048 // self.context)

    def text(self, text):
        ids = self.tokenizer.encode(text)
        window = self.context, self.context, self.rows
        return [text_nats(self.model, ids, self.tokenizer.bos_id, *window)]

    def questions(self, rows):
        encoded, _ = encode_questions(self.tokenizer, rows, self.context)
        scores = answer_scores(self.model, encoded, self.rows)
        return [value for row in scores for value, _ in row]


class LmEval:
    def __init__(self, folder, batch_size):
        self.lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)

    def text(self, text):
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0)]
        return [-value for value in self.lm.loglikelihood_rolling(requests, disable_tqdm=True)]

    def questions(self, rows):
        pairs = [("<s>" + text, choice) for _, _, (text, choices, _) in rows for choice in choices]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        return [value for value, _ in self.lm.loglikelihood(requests, disable_tqdm=True)]


def time_all(variants, work, rounds):
    """Returns ({variant: [seconds of each round]}, {variant: what it found}), after one round of
    warm-up.
    """
    seconds, found = {name: [] for name in variants}, {}
    for number in range(rounds + 1):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            found[name] = work(variants[name])
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}, found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--text", default=DATA / "wikitext2" / "wiki.valid.raw", type=Path)
    parser.add_argument("--boolq", default=DATA / "boolq" / "val.dev.jsonl", type=Path)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_sizes", default="1,8,32")
    args = parser.parse_args()
    tune_cpu()
    ours = Ours(args.model_path)
    variants = {"ours": ours}
    variants |= {
        f"lm_eval {n}": LmEval(args.model_path, int(n)) for n in args.batch_sizes.split(",")
    }
    text = args.text.read_bytes()[: args.bytes].decode("utf-8", "ignore")
    rows = usable_rows(args.boolq, to_question)[: args.questions]
    room = ours.context - 4  # only questions that fit: lm-eval would cut BOS off
    rows = [row for row in rows if len(ours.tokenizer.encode(row[2][0])) < room]
    result = {"bytes": len(text.encode()), "questions": len(rows), "unit": "s: median, min, max"}
    for kind, work in {
        "text": lambda v: v.text(text),
        "questions": lambda v: v.questions(rows),
    }.items():
        seconds, found = time_all(variants, work, args.rounds)
        for name, values in seconds.items():
            result[f"{kind}, {name}"] = [round(f(values), 3) for f in (statistics.median, min, max)]
        worst = max(
            abs(a - b) / max(1, abs(b)) for v in found.values() for a, b in zip(v, found["ours"])
        )
        result[f"{kind}, largest relative difference"] = worst
    known = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(result | known | {"machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
