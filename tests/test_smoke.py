"""Smoke prompts: scores rank as a person would, a model is asked as it was trained, files are checked."""

import gzip
import itertools
import json
import math
import random
import re
from collections import Counter
from pydoc_data.topics import topics

import pytest
import torch

import smoke
from corpus import samples
from lib.config import UserError
from lib.tokenizer import Tokenizer, render, stop_ids
from model import Llama, ModelConfig
from sample import generate
from tests import SHARED

# What a person would accept, for every prompt: as a sentence or two, and the shortest way to say it.
RIGHT = {
    "What is the capital of France?": ("The capital of France is Paris.", "Paris."),
    "How many days are there in a week?": ("There are seven days in a week.", "7"),
    "What does water become when it freezes?": ("When it freezes, water becomes ice.", "Ice."),
    "Who wrote the play Romeo and Juliet?": (
        "The play was written by the English poet William Shakespeare.",
        "Shakespeare",
    ),
    "Which planet do we live on?": ("We live on the planet that is called Earth.", "Earth."),
    "What is the opposite of hot?": ("The opposite of hot is cold.", "cold"),
    "Give me another word for happy.": ("Another word for happy is cheerful.", "Glad."),
    "What is the plural of child?": ("The plural of child is children.", "children"),
    "Complete this sentence: She was so tired that she went to": (
        "She was so tired that she went to bed early and slept all night.",
        "bed.",
    ),
    "What is a library?": (
        "A library is a place where people can read books or borrow them and take them home.",
        "A building full of books that you can borrow.",
    ),
    "Tom has three apples and gets two more. How many apples does he have now?": (
        "He has five apples now.",
        "Five.",
    ),
    "Anna is taller than Ben, and Ben is taller than Carl. Who is the tallest?": (
        "Anna is the tallest of the three.",
        "Anna.",
    ),
    "All birds have feathers, and a robin is a bird. Does a robin have feathers?": (
        "Yes, a robin has feathers, because it is a bird.",
        "Yes.",
    ),
    "It is raining and you walk outside without an umbrella. What happens to you?": (
        "I get wet, and my clothes have to dry when I come home.",
        "You get wet.",
    ),
    "Why do people wear coats in winter?": (
        "People wear coats in winter because it is cold and a coat keeps the body warm.",
        "To keep warm when it is cold outside.",
    ),
    "Tell me the beginning of a story about a lost key.": (
        "One morning the old man could not find his key. He looked in every pocket, but it was lost.",
        "Mary had lost the key to her house, and it was getting dark.",
    ),
    "Write two sentences about a dragon who is afraid of mice.": (
        "The dragon saw a mouse and ran into his cave. He was so afraid that he forgot to breathe fire.",
        "A dragon lived in a cave. Every night he hid from the mice.",
    ),
    "Write a short poem about the moon.": (
        "The moon is shining over the hill,\nThe night is dark, the trees are still.",
        "O moon, you are the light of the night, a silver boat in the sky.",
    ),
    "Describe a garden in spring.": (
        "The grass is green again, and the first flowers open in the sun. Birds sing in the old trees.",
        "There are many flowers, and the bees are busy in the roses.",
    ),
    "Imagine that you can fly like a bird. What do you see?": (
        "I see the roofs of the town far below me. The river runs through the fields like a ribbon.",
        "I see small houses and a long road between the trees.",
    ),
    "Write the word house in capital letters.": ("The word in capital letters is HOUSE.", "HOUSE"),
    "Name three fruits, separated by commas.": (
        "Three fruits that I like to eat are apple, pear, plum.",
        "apple, banana, orange",
    ),
    "Count from one to five.": (
        "I can count to five: one, two, three, four, five.",
        "1, 2, 3, 4, 5",
    ),
    "Answer with yes or no only: is snow cold?": ("Yes, it is, because it is made of ice.", "Yes"),
    "Make a numbered list of three animals.": (
        "Here are three animals that I like:\n1. The dog\n2. The cat\n3. The horse",
        "1. Dog\n2. Cat\n3. Horse",
    ),
    "Begin an encyclopedia article about the Atlantic Ocean.": (
        "The Atlantic Ocean is the second largest ocean. It lies between America and Europe.",
        "The Atlantic is an ocean between Europe and America.",
    ),
    "Begin an encyclopedia article about the elephant.": (
        "The elephant is the largest animal that lives on land. It is known for its trunk and its tusks.",
        "The elephant is a large mammal with a trunk.",
    ),
    "Begin an encyclopedia article about Albert Einstein.": (
        "Albert Einstein was a physicist who was born in Germany. He is known for the theory of relativity.",
        "Albert Einstein was a German physicist.",
    ),
    "Begin an encyclopedia article about the violin.": (
        "The violin is a musical instrument with four strings. It is played with a bow.",
        "The violin is an instrument with four strings.",
    ),
    "Begin an encyclopedia article about the Second World War.": (
        "The Second World War was a war that began in 1939, when Germany attacked Poland, and ended in 1945.",
        "It was a war in Europe and Asia that ended in 1945.",
    ),
    "Hello! How are you today?": ("Hello! I am fine, thank you. And how are you?", "Fine, thanks."),
    "Thank you very much for your help!": (
        "You are welcome. I was glad to help you.",
        "You're welcome!",
    ),
    "I feel a little sad today.": (
        "I am sorry to hear that. Do you want to talk about it?",
        "I'm sorry. Why are you sad?",
    ),
    "What do you like to eat for breakfast?": (
        "I like to eat bread with butter and a boiled egg in the morning.",
        "Toast and eggs, please.",
    ),
    "Good night! See you tomorrow.": (
        "Good night! Sleep well, and I will see you in the morning.",
        "Good night!",
    ),
    'What does the French word "bonjour" mean in English?': (
        'It means "hello", and people say it when they meet.',
        "Hello.",
    ),
    'How do you say "thank you" in Spanish?': (
        'In Spanish you can say "gracias" when you want to thank somebody.',
        "Gracias.",
    ),
    'In which language do people say "guten Morgen"?': (
        "People say it in German when they meet in the morning.",
        "German",
    ),
    'Translate into English: "Ich liebe dich."': (
        'It means "I love you" in English.',
        "I love you.",
    ),
    "What is the Italian word for water?": ('The Italian word for it is "acqua".', "acqua"),
}
OFF_TOPIC = [
    "The old bridge was closed for three weeks while the workers painted it.",
    "He put the letter into a drawer and forgot about it until the end of the year.",
    "My brother has a small shop where he sells shoes, and it is always full on Saturdays.",
    "The committee will meet again next month to decide who should write the report.",
    "She opened the window because the air in the kitchen was full of smoke.",
    "The bus was late, so we had to wait at the corner for almost an hour.",
]
# One ladder for each category, written out: shuffled words, fluent text beside the point.
LADDERS = {
    "Which planet do we live on?": (
        "planet is the on called live Earth. We that",
        "The old shop on the corner was sold to a man from the north.",
    ),
    "Who wrote the play Romeo and Juliet?": (
        "by William was poet English The written Shakespeare. play the",
        "The workers painted the bridge and went home at six.",
    ),
    "Complete this sentence: She was so tired that she went to": (
        "all that to bed tired went She early was slept night. she and so",
        "The price of bread has been rising since the end of the year.",
    ),
    "What is a library?": (
        "books people A or them take can borrow them is home. library where and read a place",
        "He was never late, because his brother woke him every morning.",
    ),
    "Why do people wear coats in winter?": (
        "cold wear keeps it coats is winter the because body a and warm. coat People in",
        "The train leaves from the second platform, and it is often late.",
    ),
    "All birds have feathers, and a robin is a bird. Does a robin have feathers?": (
        "bird. robin has because a Yes, a feathers, is it",
        "She has lived in the same street since she was a girl.",
    ),
    "Tell me the beginning of a story about a lost key.": (
        "the it was house, lost getting key to her had dark. and Mary",
        "The report says that fewer people travel by train than before.",
    ),
    "Write a short poem about the moon.": (
        "trees dark, hill, the still. The over moon The are the is night is shining",
        "You can pay for the tickets when you arrive at the office.",
    ),
    "Name three fruits, separated by commas.": (
        "are eat to plum. fruits I apple, that Three like pear,",
        "The meeting has been moved to the big room on the first floor.",
    ),
    "Answer with yes or no only: is snow cold?": (
        "it made it ice. of is, is Yes, because",
        "My father keeps his tools in a wooden box under the stairs.",
    ),
    "Begin an encyclopedia article about the elephant.": (
        "is and for lives is its largest tusks. It known the that on elephant trunk The animal land. its",
        "We had to wait for an hour, because the driver could not find the way.",
    ),
    "Begin an encyclopedia article about the Second World War.": (
        "and that began World in War 1945. a when The 1939, Poland, in Second war ended was attacked Germany",
        "He reads the paper every morning and then walks to the shop.",
    ),
    "I feel a little sad today.": (
        "that. you hear to talk am Do it? I to about want sorry",
        "The second door on the left leads to the kitchen.",
    ),
    "What do you like to eat for breakfast?": (
        "in to butter I a eat bread and egg the boiled with morning. like",
        "They moved to the city when the factory was closed.",
    ),
    'What does the French word "bonjour" mean in English?': (
        'meet. say "hello", they people and It when means it',
        "The farmer sold his horses and bought a small car.",
    ),
    'In which language do people say "guten Morgen"?': (
        "they morning. German in the it say when People meet in",
        "There is a hole in the roof, and the rain comes in.",
    ),
}
PROMPTS = {prompt["prompt"]: prompt for prompt in smoke.load_prompts()}
CHECKED = [question for question, prompt in PROMPTS.items() if "check" in prompt]


def score(question, response, finish="stop"):
    return smoke.score(PROMPTS[question], response, finish)["score"]


def shuffled(text, seed):
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


# ---- our prompts


def test_there_are_forty_prompts_in_eight_categories_and_ten_quick_ones_in_all_of_them():
    prompts, quick = smoke.load_prompts(), smoke.load_prompts(fast=True)
    counts = Counter(prompt["category"] for prompt in prompts)
    assert len(counts) == 8
    assert set(counts.values()) == {5}
    assert len({prompt["prompt"] for prompt in prompts}) == 40
    assert len(quick) == 10
    assert {prompt["category"] for prompt in quick} == counts.keys()
    assert all(prompt["base"] and prompt["keywords"] for prompt in prompts)
    assert RIGHT.keys() == PROMPTS.keys()


@pytest.mark.parametrize("question", CHECKED)
def test_a_check_takes_right_answers_and_neither_the_question_nor_other_texts(question):
    check = PROMPTS[question]["check"]
    assert all(smoke.answers(check, text) for text in RIGHT[question])
    assert not any(smoke.answers(check, text) for text in OFF_TOPIC)
    assert smoke.score(PROMPTS[question], question, "stop")["parts"]["answer"] == 0
    assert smoke.score(PROMPTS[question], PROMPTS[question]["base"], "stop")["parts"]["answer"] == 0


@pytest.mark.parametrize(
    ("question", "wrong"),
    [
        ("What is the capital of France?", "The capital of France is London."),
        ("How many days are there in a week?", "There are 17 days in a week."),
        (
            "Tom has three apples and gets two more. How many apples does he have now?",
            "He has 25 apples.",
        ),
        (
            "All birds have feathers, and a robin is a bird. Does a robin have feathers?",
            "No, no feathers.",
        ),
        ("Write the word house in capital letters.", "The word in capital letters is house."),
        ("Name three fruits, separated by commas.", "I like an apple and a pear."),
        ("Make a numbered list of three animals.", "A dog, a cat and a horse."),
        ("Answer with yes or no only: is snow cold?", "No, it is not."),
        ("Hello! How are you today?", "The house is a good one."),
    ],
)
def test_a_wrong_answer_gets_less_than_a_right_one_and_more_than_one_off_topic(question, wrong):
    result = smoke.score(PROMPTS[question], wrong, "stop")
    assert result["parts"]["answer"] == 0
    assert result["score"] < score(question, RIGHT[question][0])


# ---- the ranking


@pytest.mark.parametrize("question", LADDERS)
def test_the_ladder(question):
    words, beside_the_point = LADDERS[question]
    right = next(text for text in RIGHT[question] if sorted(text.split()) == sorted(words.split()))
    ladder = ["", " ".join(["house"] * 12), words, beside_the_point, right]
    scores = [score(question, text) for text in ladder]
    assert scores == sorted(set(scores)), list(zip(scores, ladder))


@pytest.mark.parametrize("question", PROMPTS)
def test_the_ladder_for_every_prompt(question):
    """All but the step from shuffled to fluent, which the next test counts: words may fall well by chance."""
    long, short = RIGHT[question]
    fluent = [score(question, text) for text in OFF_TOPIC]
    mixed = [score(question, shuffled(long, seed)) for seed in range(10)]
    repeated = [
        score(question, " ".join([word] * 12))
        for word in {*long.split(), *short.split(), "the", "7"}
    ]
    assert score(question, "") == 0 < min(repeated)
    assert max(repeated) < min(mixed)
    assert max(fluent) < min(score(question, long), score(question, short))


def test_shuffled_right_answers_fall_below_fluent_text_beside_the_point():
    """Measured: 93% of the comparisons, 97% for answers of twelve words and more."""
    below = {True: [], False: []}
    for question, (right, _) in RIGHT.items():
        fluent = [score(question, text) for text in OFF_TOPIC]
        for seed in range(10):
            mixed = score(question, shuffled(right, seed))
            below[len(right.split()) >= 12] += [mixed < other for other in fluent]
    assert sum(below[True]) > 0.96 * len(below[True])
    assert sum(below[False]) > 0.85 * len(below[False])
    assert len(below[True]) > 700


@pytest.mark.parametrize("question", PROMPTS)
def test_no_trick_passes_for_an_answer(question):
    """Whatever a broken model does, it stays below text that is at least fluent, and far below the answer."""
    prompt, (long, short) = PROMPTS[question], RIGHT[question]
    fluent, right = min(score(question, text) for text in OFF_TOPIC), score(question, long)
    assert score(question, question) < 0.01  # echoes
    assert score(question, f"{question} {question}") < 0.01
    assert score(question, prompt["base"]) < fluent
    assert score(question, " ".join(prompt["keywords"])) < right
    assert (
        score(question, ", ".join(prompt["keywords"])) < right or "check" in prompt
    )  # the answer among them
    assert score(question, " ".join([long] * 4)) < fluent
    assert score(question, " ".join([short] * 8)) < fluent
    assert score(question, short) > 0.5
    for noise in NOISE:
        assert score(question, noise) < 0.5 * fluent, noise


NOISE = [
    "def get(self, x_1): return self._items[x_1] if x_1 in self._items else None",
    '<div class="a"><span>{{ x }}</span></div> // TODO(fix) && i++;',
    ">>> import os\n>>> os.path.join('a', 'b')\n'a/b'\n>>> x = [i ** 2 for i in range(10)]",
    "%% == {} [] () ;; ## @@ !! && || ^^ ~~ 0x1F 0xFF",
    "Les enfants jouent dans la rue et leurs parents les regardent par la fenetre ouverte.",
    "Die Kinder spielen auf der Wiese, und ihre Eltern sitzen unter dem alten Baum.",
    "Los chicos juegan en la calle y sus padres miran desde la ventana de la casa.",
    "Я не знаю, где находится вокзал, но могу показать дорогу к реке.",
    "孩子们在街上玩耍。他们的父母从窗户里看着他们。",
    "the of and to a in that is was he for it with as his on be at by",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "1000000000000000000000000000000000000000000000000000000000000000000000000",
    "and the same, and the same, and the same, and the same, and the same, and the same, and the",
    "cat dog cat dog cat dog cat dog cat dog cat dog cat dog cat dog",
    "\x00\x01\x02\ufffd\ufffd\ufffd a \ufffd\ufffd\ufffd\ufffd\ufffd",
]


@pytest.mark.parametrize(
    "nothing", ["", " \n\t ", "...", "?!", "\x00", "\U0001f600\U0001f600", "\ufffd", '"']
)
def test_nothing_said_is_nothing_scored(nothing):
    for prompt in PROMPTS.values():
        result = smoke.score(prompt, nothing, "stop")
        assert result["score"] == 0
        assert result["parts"].keys() == smoke.score(prompt, "A dog.", "stop")["parts"].keys()


@pytest.mark.parametrize("question", PROMPTS)
def test_text_that_breaks_off_is_worth_less_than_the_same_text_brought_to_an_end(question):
    whole = (
        "The road goes up to the old house on the hill. From there you see the river and the sea."
    )
    assert score(question, whole, "length") == score(question, whole)  # it ended in time
    cut = whole.rpartition(" ")[0] + " the"
    assert score(question, cut, "length") < score(question, whole)
    assert score(question, cut, "context") == score(question, cut, "length")
    assert score(question, whole.partition(". ")[0].rpartition(" on ")[0] + " on the") < score(
        question, whole
    )


def test_scores_are_between_0_and_1_and_text_of_any_length_is_scored_at_once():
    rng, alphabet = random.Random(0), "ab \n\t.,'\"!1é-(*#"
    hostile = ["".join(rng.choices(alphabet, k=rng.randint(1, 200))) for _ in range(200)]
    hostile += [
        mark * 1000
        for mark in ("\n", " ", ".", "'", '"', "1.", "a ", "\n ", "- ", "A\n", '!"', "' ")
    ]
    for text in hostile:
        for question in ("What is the capital of France?", "What is a library?"):
            result = smoke.score(PROMPTS[question], text, "length")
            assert 0 <= result["score"] <= 1
            assert all(0 <= part <= 1 for part in result["parts"].values() if part is not None)


# ---- the parts, by hand


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one", 1),
        ("one two three four five six", 1),
        ("word word word word", 1 / 4 / 0.9),
        ("a cat a cat a cat", 3 / 6 / 0.9),  # new: a, cat, a
        ("A cat. A cat.", 3 / 4 / 0.9),
        ("of the cat and of the dog", 6 / 7 / 0.9),
    ],
)
def test_repetition(text, expected):
    assert smoke.repetition(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        ("He went home.", "stop", 1),
        ("He went home.", "length", 1),
        ('"Go home!" ', "length", 1),
        ("Paris", "stop", 1),
        ("Paris", "length", 0),
        ("He went home. She", "length", 13 / 17),
        ("He went home and she went to the shop", "stop", 0.5),
        ("He went home and she went to the", "stop", 0),
        ("1. Dog\n2. Cat\n3. Horse", "stop", 1),
        ("The value is 3.5 and", "context", 0),
    ],
)
def test_completeness(text, finish, expected):
    assert smoke.completeness(text, finish) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dog sleeps in the house.", 1),
        ("Paris", 1),
        ("12", 1),
        ("dog cat horse cow sheep goat pig hen", 4 * 1 / 8),
        ("dog = cat", 4 * 1 / 2 * 6 / 7 / 2),
        ("là", 0),
    ],
)
def test_english(text, expected):
    assert smoke.english(text) == pytest.approx(expected)


def test_own_words():
    question = "Which is bigger, an ant or an elephant?"
    copies = [question, f"{question} An elephant.", "An elephant is bigger, an ant is not."]
    left = [smoke.words_of(smoke.own_text(text, question, 5)) for text in copies]
    assert left == [[], ["an", "elephant"], smoke.words_of(copies[2])]
    assert smoke.words_of(smoke.own_text("Who are you? Me.", "Who are you?", 3)) == ["me"]
    assert smoke.words_of(smoke.own_text("don't do it now", "Don\u2019t do it!", 3)) == ["now"]


def test_relevance():
    prompt = {
        "prompt": "Write about the sea.",
        "keywords": ["sea", "wave", "fish", "ship", "new york"],
    }
    assert smoke.relevance("Nothing.", prompt) == 0
    assert smoke.relevance("The seasons of fisherman Waverly.", prompt) == 0  # not those words
    assert smoke.relevance("The WAVES.", prompt) == pytest.approx(1 / 3)
    assert smoke.relevance("Fishing ships from New York.", prompt) == 1
    assert smoke.relevance("I like the sea.", {"prompt": "Write a sentence about the sea."}) == 1
    assert smoke.relevance("What do you mean?", {"prompt": "?!?"}) == 0
    assert smoke.relevance("I like cats.", {"prompt": "Write a sentence about the sea."}) == 0


def test_an_answer_has_to_come_early():
    check = {"kind": "regex", "answer": "\\bparis\\b"}
    assert smoke.answers(check, "word " * 29 + "Paris")
    assert not smoke.answers(check, "word " * 30 + "Paris")
    assert smoke.answers({"kind": "number", "answer": "12"}, " 12.\n")
    assert not smoke.answers({"kind": "number", "answer": "12"}, "12 or 13")


def test_distinct_n():
    texts = ["The cat and the dog.", "The cat!", ""]
    assert smoke.distinct(texts, 1) == 4 / 7  # the cat and dog, of seven words
    assert smoke.distinct(texts, 2) == 4 / 7  # the-cat cat-and and-the the-dog
    assert smoke.distinct([""], 1) == 0


# ---- the table of pairs


def sentences(texts):
    for text in texts:
        for sentence in re.split(r"(?<=[a-z)][.?!])\s+", re.sub(r"\s+", " ", text)):
            if (
                sentence[:1].isupper()
                and sentence[-1:] in ".?!"
                and 10 <= len(sentence.split()) <= 40
            ):
                yield sentence


def test_the_order_of_words_in_pythons_own_documentation_is_that_of_english():
    found = list(sentences(topics[name] for name in sorted(topics)))[:400]
    pairs = [(smoke.order(text), smoke.order(shuffled(text, 1))) for text in found]
    assert len(found) == 400
    assert sum(one > other for one, other in pairs) > 0.8 * len(pairs)
    assert sum(one for one, _ in pairs) > 3 * sum(other for _, other in pairs)


CORPORA = SHARED / "corpora"
COUNTED = (("us_speeches", 118, 8000), ("c4_demo", 286, 3000), ("wikipedia_demo", 29, 40000))


@pytest.mark.skipif(not CORPORA.is_dir(), reason="the corpora are not here")
def test_the_table_is_what_its_corpora_say():
    counts = Counter()
    for name, documents, size in COUNTED:
        with gzip.open(CORPORA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line)["text"] for line in file]
        for text in rows[:: max(1, len(rows) // documents)][:documents]:
            counts.update(itertools.pairwise(smoke.kinds_of(text[:size])))
    kinds = sorted({kind for kind, _ in smoke.LOG_ODDS})
    counts = {pair: counts[pair] + 0.5 for pair in itertools.product(kinds, repeat=2)}
    total = sum(counts.values())
    first = {kind: sum(counts[kind, other] for other in kinds) for kind in kinds}
    second = {kind: sum(counts[other, kind] for other in kinds) for kind in kinds}
    for (one, other), count in counts.items():
        odds = math.log(count * total / (first[one] * second[other]))
        assert smoke.LOG_ODDS[one, other] == pytest.approx(min(1, max(-3, odds)), abs=0.051), (
            one,
            other,
        )


# ---- files of prompts


def write(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_prompts_come_from_json_jsonl_and_text_files(tmp_path):
    row = {
        "prompt": "One?",
        "category": "mine",
        "check": {"kind": "word", "answer": "yes"},
        "quick": True,
    }
    rows = [row, {"prompt": "Two?", "source": "elsewhere", "response": "No."}, "Three?"]
    expected = [
        row,
        {"category": "custom", "prompt": "Two?"},
        {"category": "custom", "prompt": "Three?"},
    ]
    as_json = write(tmp_path, "p.json", "\ufeff" + json.dumps(rows))
    as_lines = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    as_text = write(tmp_path, "p.txt", "One?\r\n\n  Two?\nThree?")
    assert smoke.load_prompts(as_json) == smoke.load_prompts(str(as_lines)) == expected
    assert smoke.load_prompts(as_json, fast=True) == [row]
    assert [prompt["prompt"] for prompt in smoke.load_prompts(as_text)] == [
        "One?",
        "Two?",
        "Three?",
    ]
    assert len(smoke.load_prompts(as_text, fast=True)) == 3  # nothing marked: all


def test_the_held_out_tasks_of_the_sample_files_are_prompts(tmp_path):
    rows = samples.make_rows(seed=42)["sft_val"][:50]
    path = write(tmp_path, "sft_val.jsonl", "\n".join(map(json.dumps, rows)))
    for prompt, row in zip(smoke.load_prompts(path), rows, strict=True):
        assert smoke.score(prompt, row["response"], "stop")["parts"]["answer"] == 1


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("p.json", '{"prompts": []}', ["p.json", "must be a list"]),
        ("p.json", "[]", ["p.json", "holds no prompt"]),
        ("p.json", '[{"prompt": "a"},]', ["p.json", "line 1 column"]),
        ("p.json", '[{"prompt": "a"}, 3]', ["p.json row 2", "object", "3"]),
        ("p.json", '[{"text": "a"}]', ["p.json row 1", "no 'prompt'", "text"]),
        ("p.json", '[{"prompt": " "}]', ["p.json row 1", "prompt must be a text"]),
        ("p.json", '[{"prompt": "a\\ud800"}]', ["p.json row 1", "prompt must be a text"]),
        ("p.json", '[{"prompt": "a", "keyword": ["b"]}]', ["row 1", "'keyword'", "'keywords'"]),
        (
            "p.json",
            '[{"prompt": "a", "keywords": "b"}]',
            ["row 1", "keywords must be a list", '"b"'],
        ),
        (
            "p.json",
            '[{"prompt": "a", "check": {"kind": "is", "answer": "b"}}]',
            ["row 1", "exact, word, number"],
        ),
        (
            "p.json",
            '[{"prompt": "a", "check": {"kind": "regex", "answer": "("}}]',
            ["row 1", "check", "regex"],
        ),
        (
            "p.json",
            '[{"prompt": "a", "check": {"kind": "overlap", "answer": "b"}}]',
            ["row 1", "share"],
        ),
        (
            "p.json",
            '[{"prompt": "a", "min_words": 0}]',
            ["row 1", "min_words must be 1..1000, got 0"],
        ),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', ["p.jsonl row 2"]),
        ("p.txt", "\n \n", ["p.txt", "holds no prompt"]),
        ("p.csv", "prompt\na\n", ["p.csv", ".jsonl"]),
    ],
)
def test_a_file_that_is_no_good_is_one_line(tmp_path, name, content, parts):
    with pytest.raises(UserError) as caught:
        smoke.load_prompts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"p\.txt: not UTF-8"):
        smoke.load_prompts(tmp_path / "p.txt")
    with pytest.raises(UserError, match=r"gone\.json: No such file"):
        smoke.load_prompts(tmp_path / "gone.json")


# ---- a model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = ModelConfig(n_layer=1, d_model=32, n_head=4, d_ff=64, vocab_size=384, sequence_length=512)
    return Llama(cfg).eval()


def with_template(tokenizer, name):
    return Tokenizer(tokenizer.model, template=name)


def test_a_run_gives_every_prompt_a_score_and_the_same_again(model, tiny_tokenizer):
    prompts = smoke.load_prompts(fast=True)
    result, again = (smoke.run(model, tiny_tokenizer, prompts, max_new_tokens=12) for _ in range(2))
    rows = result["responses"]
    assert [row["prompt"] for row in rows] == [prompt["prompt"] for prompt in prompts]
    for row, prompt in zip(rows, prompts):
        assert smoke.score(prompt, row["response"], row["finish"]) == {
            "score": row["score"],
            "parts": row["parts"],
        }
    assert result["score"] == pytest.approx(sum(row["score"] for row in rows) / 10)
    assert result["by_category"].keys() == {prompt["category"] for prompt in prompts}
    assert result["eos_rate"] == sum(row["finish"] == "stop" for row in rows) / 10
    assert result["distinct_n"].keys() == {"1", "2"}
    assert result["tokens_per_second"] > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {**again, "tokens_per_second": 0} == {**result, "tokens_per_second": 0}


def test_a_response_depends_on_the_seed_and_on_no_other_prompt(model, tiny_tokenizer, monkeypatch):
    prompts = smoke.load_prompts(fast=True)
    alone = [
        smoke.run(model, tiny_tokenizer, [p], max_new_tokens=6)["responses"][0] for p in prompts
    ]
    monkeypatch.setattr(smoke, "BATCH", 4)
    together = smoke.run(model, tiny_tokenizer, prompts[::-1], max_new_tokens=6)["responses"][::-1]
    assert together == alone
    other = smoke.run(model, tiny_tokenizer, prompts, max_new_tokens=6, seed=1)["responses"]
    assert sum(one["response"] != two["response"] for one, two in zip(other, alone)) > 5


@pytest.mark.parametrize("template", [None, "chatml", "instruct", "chat"])
def test_a_model_is_asked_in_its_own_template_or_continues_plain_text(
    model, tiny_tokenizer, template, monkeypatch
):
    prompt = smoke.load_prompts()[0]
    tokenizer, seen = with_template(tiny_tokenizer, template), []

    def spy(model, requests):
        seen.extend(requests)
        return generate(model, requests)

    monkeypatch.setattr(smoke, "generate", spy)
    result = smoke.run(model, tokenizer, [prompt], max_new_tokens=4)
    assert result["settings"]["template"] == template
    row = result["responses"][0]
    if template is None:
        assert seen[0].prompt == [1, *tokenizer.encode("The capital of France is")]
        assert row["asked"] == "The capital of France is"
    else:
        messages = [{"role": "user", "content": prompt["prompt"]}]
        assert (
            seen[0].prompt == render(tokenizer, messages, template, add_generation_prompt=True)[0]
        )
        assert row["asked"] == prompt["prompt"]
        assert row["response"] == row["response"].strip()
    assert set(seen[0].stop_ids) == set(stop_ids(tokenizer, template))


def test_ends_by_a_stop_id_are_counted(tiny_tokenizer):
    cfg = ModelConfig(n_layer=1, d_model=16, n_head=2, d_ff=16, vocab_size=384, sequence_length=512)
    model = Llama(cfg).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every id as likely as any other, EOS too: a row stops with 12%
    result = smoke.run(model, tiny_tokenizer, smoke.load_prompts(), max_new_tokens=48)
    assert 0 < result["eos_rate"] < 0.4


def test_a_prompt_that_fills_the_context_is_one_line(model, tiny_tokenizer):
    with pytest.raises(
        UserError, match=r"prompt string \"x.*\.\.\.: \d+ tokens leave no room .* 512; shorten"
    ):
        smoke.run(model, tiny_tokenizer, [{"prompt": "x" * 3000, "category": "custom"}])


def test_the_table_is_markdown(model, tiny_tokenizer):
    result = smoke.run(model, tiny_tokenizer, smoke.load_prompts(fast=True), max_new_tokens=4)
    lines = smoke.table(result).split("\n")
    assert len(lines) == 2 + 8 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert lines[-1].startswith(f"| all | {result['score']:.2f} |")
    assert lines[2].startswith("| knowledge | ")
