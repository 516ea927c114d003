"""Smoke prompts: broken ranks below working; models are asked as trained; files are checked."""

import json

import pytest
import torch

import eval as evaluation
from corpus.samples import passes
from eval import Prompt, ask_prompts, read_prompts, score_response
from lib.config import UserError
from lib.conversation import render, stop_ids
from lib.tokenizer import Tokenizer
from model import Llama, ModelConfig
from sample import generate
from tests import ROOT

# for every prompt what a person would accept, in few words: "prompt | answer"
ANSWERS = (ROOT / "tests" / "smoke_answers.txt").read_text(encoding="utf-8")
RIGHT = dict(line.split(" | ") for line in ANSWERS.strip().split("\n"))
OFF_TOPIC = [
    "The old bridge was closed for three weeks while the workers painted it.",
    "He put the letter into a drawer and forgot about it until the end of the year.",
    "My brother has a small shop where he sells shoes, and it is always full on Saturdays.",
    "The committee will meet again next month to decide who should write the report.",
    "She opened the window because the air in the kitchen was full of smoke.",
    "The bus was late, so we had to wait at the corner for almost an hour.",
]
PROMPTS = {prompt.prompt: prompt for prompt in read_prompts()}


def score(question, response, finish="stop"):
    return score_response(PROMPTS[question], response, finish)["score"]


def parts(response, finish="stop", **fields):
    return score_response(Prompt("What do you say?", **fields), response, finish)["parts"]


# ---- our prompts


def test_there_are_forty_prompts_in_eight_categories_and_ten_quick_ones_in_all_of_them():
    prompts, quick = read_prompts(), read_prompts(fast=True)
    categories = [prompt.category for prompt in prompts]
    assert len(PROMPTS) == 40
    assert {categories.count(name) for name in categories} == {5}
    assert len(quick) == 10
    assert {prompt.category for prompt in quick} == set(categories)
    assert all(prompt.base and prompt.keywords for prompt in prompts)
    assert RIGHT.keys() == PROMPTS.keys()


@pytest.mark.parametrize("question", [q for q, prompt in PROMPTS.items() if prompt.check])
def test_a_check_takes_right_answers_and_neither_the_question_nor_other_texts(question):
    prompt = PROMPTS[question]
    assert passes(prompt.check, RIGHT[question])
    assert not any(passes(prompt.check, text) for text in OFF_TOPIC)
    for text in (question, prompt.base):
        assert score_response(prompt, text, "stop")["parts"]["answer"] == 0


@pytest.mark.parametrize(
    ("question", "wrong"),
    [
        ("What is the capital of France?", "The capital of France is London."),
        ("How many days are there in a week?", "There are 17 days in a week."),
        ("Write the word house in capital letters.", "The word in capital letters is house."),
        ("Name three fruits, separated by commas.", "I like an apple and a pear."),
        ("Make a numbered list of three animals.", "A dog, a cat and a horse."),
        ("Answer with yes or no only: is snow cold?", "No, it is not."),
        ("Hello! How are you today?", "The house is a good one."),
    ],
)
def test_a_wrong_answer_gets_less_than_a_right_one(question, wrong):
    result = score_response(PROMPTS[question], wrong, "stop")
    assert result["parts"]["answer"] == 0
    assert result["score"] < score(question, RIGHT[question])


# ---- the ranking


@pytest.mark.parametrize("question", PROMPTS)
def test_no_trick_passes_for_an_answer(question):
    """Nothing, an echo and a repeated word stay below fluent text, and that below answers."""
    right = RIGHT[question]
    fluent = [score(question, text) for text in OFF_TOPIC]
    words = {"the", "cat dog", *OFF_TOPIC[0].split()}
    repeated = [score(question, " ".join([word] * 12)) for word in words]
    assert all(score(question, echo) == 0 for echo in ("", question, f"{question} {question}"))
    assert 0 < max(repeated) < min(fluent)
    assert max(fluent) < score(question, right)
    assert score(question, " ".join([right] * 8)) < score(question, right)


@pytest.mark.parametrize("nothing", ["", " \n\t ", "...", "?!", "\x00", "\U0001f600", "\ufffd"])
def test_nothing_said_is_nothing_scored(nothing):
    for prompt in PROMPTS.values():
        result = score_response(prompt, nothing, "stop")
        assert result == {"score": 0, "parts": dict.fromkeys(result["parts"], 0)}


# ---- the parts, by hand


@pytest.mark.parametrize(
    ("part", "text", "expected"),
    [
        ("repetition", "one", 1),
        ("repetition", "one two three four five six", 1),
        ("repetition", "abcdefgh" * 2, 8 / 9),  # the ninth run of eight is the first again
        ("repetition", "a cat. a cat. a cat. a cat", 7 / 19),
        ("ending", "He went home.", 1),
        ("ending", '"Go home!" ', 1),
        ("ending", "Paris", 0),
        ("ending", "He went home. She", 13 / 17),
        ("ending", "The value is 3.5 and", 0),
    ],
)
def test_repetition_and_ending_are_those_counted_by_hand(part, text, expected):
    assert parts(text, "length")[part] == pytest.approx(expected)
    assert parts(text, "stop")["ending"] == 1


def test_answers_are_keywords_in_any_form_where_there_is_no_check():
    keywords = ("sea", "wave", "fish", "ship", "new york")
    texts = {"Nothing.": 0, "The seasons of fisherman Waverly.": 0, "The WAVES.": 1 / 3}
    texts |= {"Fishing ships from New York.": 1}
    for text, share in texts.items():
        assert parts(text, keywords=keywords)["answer"] == pytest.approx(share)
    assert parts("The sea.")["answer"] is None
    assert score_response(Prompt("What?"), "It is the sea.", "stop")["score"] == 1


# ---- files of prompts


def write(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def test_prompts_come_from_json_jsonl_and_text_files(tmp_path):
    check = {"kind": "word", "answer": "yes"}
    row = {"prompt": "One?", "category": "mine", "check": check, "quick": True}
    rows = [row, {"prompt": "Two?", "source": "elsewhere", "response": "No."}, "Three?"]
    expected = [Prompt(**row), Prompt("Two?"), Prompt("Three?")]
    as_json = write(tmp_path, "p.json", "\ufeff" + json.dumps(rows))
    as_lines = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    as_text = write(tmp_path, "p.txt", "One?\r\n\n  Two?\nThree?")
    assert read_prompts(as_json) == read_prompts(as_lines) == expected
    assert read_prompts(as_json, fast=True) == expected[:1]
    assert [prompt.prompt for prompt in read_prompts(as_text)] == ["One?", "Two?", "Three?"]
    assert len(read_prompts(as_text, fast=True)) == 3  # nothing marked: all


PROMPT = '[{"prompt": "a", %s}]'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", '[{"prompt": "a"}, 3]', ["element 2", "prompt"]),
        ("p.json", '[{"prompt": "a\\ud800"}]', ["prompt", "surrogates"]),
        ("p.json", PROMPT % '"keywords": "b"', ["keywords must be a list of str", '"b"']),
        ("p.json", PROMPT % '"check": {"kind": "is", "answer": "b"}', ["no such check: is"]),
        ("p.json", PROMPT % '"check": {"kind": "overlap", "answer": "b"}', ["check", "share"]),
        ("p.json", PROMPT % '"min_words": 0', ["min_words must be int 1..1000, got 0"]),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["line 2"]),
    ],
)
def test_a_file_that_is_no_good_is_one_line(tmp_path, name, content, words):
    with pytest.raises(UserError) as caught:
        read_prompts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in [name, *words]), str(caught.value)


# ---- a model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = ModelConfig(n_layer=1, d_model=32, n_head=4, d_ff=64, vocab_size=384, sequence_length=512)
    return Llama(cfg).eval()


def test_a_run_gives_every_prompt_a_score_and_the_same_again(model, tiny_tokenizer):
    prompts = read_prompts(fast=True)
    result, again = (ask_prompts(model, tiny_tokenizer, prompts, 12) for _ in range(2))
    rows = result["responses"]
    assert [row["prompt"] for row in rows] == [prompt.prompt for prompt in prompts]
    for row, prompt in zip(rows, prompts):
        scores = {"score": row["score"], "parts": row["parts"]}
        assert score_response(prompt, row["response"], row["finish"]) == scores
    assert result["score"] == pytest.approx(sum(row["score"] for row in rows) / 10)
    for name, value in result["parts"].items():
        assert value == pytest.approx(sum(row["parts"][name] for row in rows) / 10)
    assert result["by_category"].keys() == {prompt.category for prompt in prompts}
    assert result["eos_rate"] == sum(row["finish"] == "stop" for row in rows) / 10
    assert json.loads(json.dumps(result, allow_nan=False)) == result == again


@pytest.mark.parametrize("template", [None, "chatml", "instruct", "chat"])
def test_a_model_is_asked_in_its_own_template_or_continues_plain_text(
    model, tiny_tokenizer, template, monkeypatch
):
    prompt, seen = read_prompts()[0], []
    config = {"prompt_template": template, "tokenizer_model_sha256": tiny_tokenizer.sha256}
    tokenizer = Tokenizer(tiny_tokenizer.model, config=config)

    def spy(model, requests):
        seen.extend(requests)
        return generate(model, requests)

    monkeypatch.setattr(evaluation, "generate", spy)
    result = ask_prompts(model, tokenizer, [prompt], max_new_tokens=4)
    row, ids = result["responses"][0], [1, *tokenizer.encode("The capital of France is")]
    if template:
        messages = [{"role": "user", "content": prompt.prompt}]
        ids = render(tokenizer, messages, template, add_generation_prompt=True)[0]
        assert row["response"] == row["response"].strip()
    assert seen[0].prompt == ids
    assert row["asked"] == (prompt.prompt if template else "The capital of France is")
    assert result["settings"]["template"] == template
    assert set(seen[0].stop_ids) == set(stop_ids(tokenizer, template))
