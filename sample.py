"""A model in the terminal: a prompt and how the model continues it.

python sample.py --model_path=checkpoints/pretrain/tiny/final --prompt="Once upon a time" --num_samples=2
"""

import secrets
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from chat import Chat, converse, visible
from engine import Engine, Reply, Request, Sampling, generate, open_model
from lib.config import PositiveInt, Range, UserError, narrow, run
from lib.tokenizer import stop_ids


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """One prompt and how to continue it."""

    model_path: str  # a model folder
    prompt: str = ""  # text to continue; none at all is fine: a document's beginning
    chat: bool = False  # converse in the model's chat template; with a prompt answer that and leave
    system: str = ""  # in a chat: what the model is told to be
    max_new_tokens: PositiveInt | None = (
        None  # of a sample or answer, at most; none = 64, in a chat 512
    )
    num_samples: Annotated[int, Range(1, 1024)] = (
        1  # generated side by side, with seeds seed, seed + 1, ...
    )
    stop: tuple[str, ...] = ()  # texts before which a sample ends, separated by commas
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    # fp32 on a CPU, bf16 on a GPU that has it; int8 (CPU) is a fourth of the memory, faster, and a little off
    dtype: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    compile: bool = (
        False  # CUDA only: fuse the decode step and replay it as a graph; takes a while to start
    )

    def __post_init__(self):
        if not all(self.stop):
            raise ValueError(
                "stop: an empty text would stop everything; give at least one character"
            )
        if self.chat and self.num_samples > 1:
            raise ValueError(
                "num_samples, chat: a chat gives one answer at a time; leave one of them out"
            )
        if self.system and not self.chat:
            raise ValueError("system is for --chat: a prompt alone is continued as it stands")


ENDS = {
    "stop": "ended by itself or by a stop text",
    "length": "max_new_tokens reached",
    "context": "the model's context of {} is full",
}


def main(cfg):
    model, tokenizer = open_model(cfg.model_path, cfg.device, cfg.dtype)
    device = model.lm_head.weight.device
    if cfg.compile and device.type != "cuda":
        raise UserError(
            f"compile: CUDA graphs need CUDA, and this run is on {device.type}; leave it off"
        )
    if cfg.chat:
        return talk(cfg, model, tokenizer)
    requests, engine = make_requests(cfg, tokenizer), None
    if cfg.compile:
        length = len(requests[0].prompt) + requests[0].max_new_tokens
        engine = Engine(model, len(requests), length, graphs=True)
        rehearsal = [replace(request, ids=[]) for request in requests]  # compiles on the way
        deque(generate(model, rehearsal, engine), maxlen=0)
    replies = [Reply(tokenizer, cfg.stop) for _ in requests]
    times = show(generate(model, requests, engine), requests, replies)
    print(summary(requests, times, model), file=sys.stderr)


def talk(cfg, model, tokenizer):
    """Answers the one prompt there is, or converses."""
    length = cfg.max_new_tokens or 512
    chat = Chat(model, tokenizer, narrow(cfg, Sampling), length, cfg.stop, cfg.system, cfg.compile)
    if tokenizer.template is None:
        print(tokenizer.without_template(cfg.model_path), file=sys.stderr)
    if cfg.prompt:
        return chat.ask(cfg.prompt)
    converse(chat)


def make_requests(cfg, tokenizer):
    """Returns num_samples requests for the same prompt, each with its own seed."""
    try:
        prompt = [tokenizer.bos_id, *tokenizer.encode(cfg.prompt)]
    except UserError as problem:
        raise UserError(f"prompt: {problem}; write it as UTF-8") from None
    ends = stop_ids(tokenizer, tokenizer.template)
    first = secrets.randbits(32) if cfg.seed is None else cfg.seed
    rows = [
        replace(narrow(cfg, Sampling), seed=(first + i) % 2**64) for i in range(cfg.num_samples)
    ]
    return [Request(prompt, cfg.max_new_tokens or 64, row, ends) for row in rows]


def show(steps, requests, replies):
    """Prints the samples one below the other: the first as it is written, the next when its turn comes.

    Several get headers. Returns the times at which decoding began, gave its first tokens and gave its last.
    """
    times, texts, turn = [time.perf_counter()], [""] * len(requests), 0
    header = "--- sample {} ---\n" if len(requests) > 1 else ""
    print(header.format(1), end="")
    for ids in steps:
        times.append(time.perf_counter())
        for row, (id, request, reply) in enumerate(zip(ids, requests, replies)):
            texts[row] += "" if id is None else reply.push(id)
            if reply.stopped:
                request.finish = "stop"
            if request.finish:
                texts[row] += reply.end()
        while turn < len(requests):
            text, texts[turn] = texts[turn], ""
            print(visible(text), end="", flush=True)
            if not requests[turn].finish:
                break
            turn += 1
            print("\n" + header.format(turn + 1) * (turn < len(requests)), end="", flush=True)
    return times[0], times[min(1, len(times) - 1)], times[-1]


def summary(requests, times, model):
    """Returns what to know about a run: why each sample ended, its seed, and the speed."""
    lines, (begin, first, last) = [], times
    for number, request in enumerate(requests, start=1):
        end = ENDS[request.finish].format(model.cfg.sequence_length)
        lines.append(
            f"sample {number}: {len(request.ids)} tokens, {end}; seed {request.sampling.seed}"
        )
    weight, count = model.lm_head.weight, sum(len(request.ids) for request in requests)
    speed = (
        f"{count} tokens in {last - begin:.2f} s: {count / max(last - begin, 1e-9):,.0f} tokens/s"
    )
    first = f"the first after {1000 * (first - begin):.0f} ms (prompt of {len(requests[0].prompt)})"
    where = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
    return "\n".join([*lines, f"{speed}, {first}; {where}"])


if __name__ == "__main__":
    run(main, SampleConfig, __doc__)
