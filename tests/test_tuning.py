"""tuning.py: what sft.py and dpo.py say of a model while they train it."""

import pytest
import torch

from lib.tokenizer import Tokenizer, render
from model import load_model
from sft import answer_to
from tests.align import finished, make_base
from tests.conftest import write_rows
from tests.runs import records

ANSWERS = [(f"what is {n}?", f"a {n}", "I won't say") for n in range(12)]
ROWS = {
    "sft": [{"prompt": q, "response": a} for q, a, _ in ANSWERS],
    "dpo": [{"prompt": q, "chosen": a, "rejected": r} for q, a, r in ANSWERS],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    return make_base(tmp_path_factory.mktemp("tuning") / "base", tiny_tokenizer, "chatml")


def greedy_by_transformers(folder, question, count):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    made = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**made, do_sample=False, max_new_tokens=count)[
        0, made["input_ids"].shape[1] :
    ]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_each_evaluation_shows_a_held_out_question_and_the_greedy_answer(tmp_path, base, program):
    data = write_rows(tmp_path / "data.jsonl", ROWS[program][2:])
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[program][:2])
    knobs = {"model_path": base, "dataset_path": data, "val_path": held_out, "sample_tokens": 12}
    out = finished(program, tmp_path / "out", max_steps=12, save_steps=12, eval_steps=6, **knobs)
    shown = [(r["step"], r["question"]) for r in records(out) if "answer" in r]
    assert shown == [(6, "what is 0?"), (12, "what is 0?")]
    answer = records(out)[-1]["answer"]
    log = out.with_suffix(".log").read_text()
    assert f"    question: 'what is 0?'\n    answer: {answer!r}\n" in log
    assert "sequence_length 64, the model's whole context; a shorter one takes less memory" in log
    assert answer == greedy_by_transformers(out / "final", "what is 0?", 12)
    knobs |= {"sample_tokens": 0, "sequence_length": 60, "max_steps": 1, "warmup_steps": 0}
    silent = finished(program, tmp_path / "silent", **knobs)
    assert not any("answer" in r for r in records(silent))
    assert "whole context" not in silent.with_suffix(".log").read_text()


def test_asked_is_the_first_question_that_leaves_room_for_an_answer(base):
    model, tokenizer = load_model(base), Tokenizer.load(base)

    def question(text):
        return [{"role": "user", "content": text}]

    class Config:
        sample_tokens = 5

    prompts = [[], question("why? " * 60), question("who jumps?"), question("when?")]
    with torch.no_grad():
        shown = answer_to(Config, tokenizer, "chatml", prompts, 64)(model)
        assert shown["question"] == "who jumps?"
        ids, _ = render(tokenizer, prompts[2], "chatml", add_generation_prompt=True)
        for _ in range(5):  # the plain computation, without a cache
            ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
            if ids[-1] in (tokenizer.eos_id, tokenizer.im_end_id):
                break
        length = len(render(tokenizer, prompts[2], "chatml", add_generation_prompt=True)[0])
        assert shown["answer"] == tokenizer.decode(ids[length:]).strip()
        assert answer_to(Config, tokenizer, "chatml", prompts[:2], 64)(model) == {}
