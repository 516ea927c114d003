"""dedup.py: datasketch's signatures, brute force's decisions, in any batches and after kills."""

import gzip
import hashlib
import json
import os
import re
import tracemalloc
from collections import Counter
from itertools import cycle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.clean import UNSPACED
from corpus.dedup import PERMUTATIONS, Index, band_shape, minhash, sha256, shingles
from tests import SHARED

NEAR, EXACT = "near-duplicate", "exact-duplicate"
PAIRS = SHARED / "dedup"


def prose(number, words=300):
    """Returns a text that shares no 5-gram with another number's."""
    random = np.random.RandomState(number)
    return " ".join(f"{'abcdefghij'[n % 10]}{n:x}" for n in random.randint(0, 10**6, words))


def changed(text, share):
    """Returns the text with a share of its words replaced, all in one place."""
    words = text.split(" ")
    count = round(len(words) * share)
    return " ".join([f"new{n}" for n in range(count)] + words[count:])


def grams(text):
    """Returns the set of word 5-grams: the oracle."""
    words = re.findall(rf"(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def jaccard(a, b):
    return len(grams(a) & grams(b)) / max(1, len(grams(a) | grams(b)))


def judge(index, digests, signatures, sizes=(500,)):
    """Returns the reasons of all documents, given in batches of these sizes, again and again."""
    reasons = []
    for size in cycle(sizes):
        batch = slice(len(reasons), len(reasons) + size)
        reasons += index.judge(digests[batch], signatures[batch])
        if len(reasons) == len(digests):
            return reasons


def index_in(folder, threshold):
    return Index(open(folder / "digests", "ab"), open(folder / "signatures", "ab"), threshold)


def bytes_of(index):
    """The memory of an index's arrays."""
    return sum(run.nbytes for runs in (index.distinct, *index.bands) for run in runs.runs)


@pytest.fixture
def new_index(tmp_path):
    """Makes an index in a folder of its own."""

    def make(threshold=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return index_in(folder, threshold)

    return make


# ---- fingerprints

TEXTS = [
    prose(1),
    changed(prose(1), 0.2),
    "only four words here",
    "only four words",
    "",
    "...!?",
    "Naïve CAFÉ — “quoted”, isn't it? Straße ΣΟΦΟΣ İstanbul 東京 x_1 a\u0301b",
    "naïve café quoted isn t it straße σοφος i̇stanbul 東京 x_1 a b",
    "one two three four five six seven eight",
    "two three four five six seven eight nine",
    "nul\0s stay\0 apart \ud800 lone",
]


def test_digests_are_sha256():
    texts = TEXTS[:-1]
    expected = [hashlib.sha256(text.encode()).digest()[:8] for text in texts]
    assert [row.tobytes() for row in sha256(texts)] == expected
    assert sha256([]).shape == (0,)
    assert minhash([], 1).shape == (0, PERMUTATIONS)


def shingle_sets(texts):
    hashes, counts = shingles([text.lower() for text in texts])
    assert len(hashes) == sum(counts)
    return [set(row.tolist()) for row in np.split(hashes, np.cumsum(counts)[:-1])]


letters = st.text(st.sampled_from("ab é\u2014_1\n\u0130\u03a3\0東京\uff0cกิ한"), max_size=60)


@given(st.lists(letters, min_size=1, max_size=6))
@example(TEXTS)
@settings(max_examples=150, deadline=None)
def test_shingles_are_the_distinct_word_5_grams(texts):
    """Every 5-gram has one hash and every hash one 5-gram, wherever in a batch the text stands."""
    sets, expected = shingle_sets(texts), [grams(text) for text in texts]
    assert [len(hashes) for hashes in sets] == [len(tuples) for tuples in expected]
    for a in range(len(texts)):
        assert sets[a] == shingle_sets(texts[a : a + 1])[0]
        for b in range(a):
            assert len(sets[a] & sets[b]) == len(expected[a] & expected[b])


@pytest.mark.parametrize("seed", [1, 42, 2**32 + 5])
def test_signatures_are_datasketchs(seed):
    from datasketch import MinHash

    for text, signature in zip(TEXTS, minhash(TEXTS, seed), strict=True):
        oracle = MinHash(num_perm=PERMUTATIONS, seed=seed % 2**32, hashfunc=int, scheme="affine32")
        for value in shingles([text.lower()])[0].tolist():
            oracle.update(value)
        assert signature.tolist() == oracle.hashvalues.tolist()


@pytest.mark.parametrize("unit", ["a", "<", " ", "a ", "\n", "\u200b", "a\u0301", "é "])
def test_a_megabyte_of_anything_passes(unit):
    assert minhash([unit * (1_000_000 // len(unit))], 1).shape == (1, PERMUTATIONS)


# ---- the index


def test_copies_in_any_case_go_and_texts_without_words_stay(new_index):
    text = prose(1)
    near, shouted, other = changed(text, 0.05), text.upper(), changed(text, 0.6)
    texts = [text, text, near, near, shouted, other, prose(2), "", "", "...", "?!", "ab", "Ab"]
    expected = [None, EXACT, NEAR, EXACT, NEAR, None, None, None, EXACT, None, None, None, NEAR]
    assert judge(new_index(0.8), sha256(texts), minhash(texts, 42)) == expected
    index = new_index()
    assert index.judge(sha256(texts)) == [EXACT if reason == EXACT else None for reason in expected]
    assert index.count == 0
    assert bytes_of(index) <= 8 * len(texts)


@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.001, 1e-6])
def test_bands_fit_the_threshold(threshold, new_index):
    bands, rows = band_shape(threshold)
    assert bands * rows <= PERMUTATIONS
    assert (1 - threshold**rows) ** bands <= 0.02 or (bands, rows) == (PERMUTATIONS, 1)
    for number in range(8):
        for share in (0.01, 0.2, 0.5, 0.8):
            pair = prose(number), changed(prose(number), share)
            reason = judge(new_index(threshold), sha256(pair), minhash(pair, 42))[1]
            if abs(jaccard(*pair) - threshold) > 0.17:  # four sigmas
                assert reason == (NEAR if jaccard(*pair) > threshold else None)


SCRIPTS = {  # letters, and how many to draw
    "Chinese": range(0x4E00, 0x5200),
    "Japanese": [*range(0x3041, 0x3090), *range(0x5200, 0x5400)],
    "Thai": range(0x0E01, 0x0E2F),
    "Khmer": range(0x1780, 0x17A3),
    "Lao": [code for code in range(0x0E81, 0x0EAF) if chr(code).isalnum()],
    "Burmese": range(0x1000, 0x102A),
    "Tibetan": [code for code in range(0x0F40, 0x0F6A) if chr(code).isalnum()],
    "mixed": [*range(0x4E00, 0x5200), *b"abc XYZ 019 .,"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_near_duplicates_are_found_where_no_spaces_are_written(script, new_index):
    random = np.random.RandomState(5)

    def text():
        return "".join(map(chr, random.choice(SCRIPTS[script], 1500)))

    first, other = text(), text()
    end = len(first) - 40
    near = first[:end] + text()[:40]  # 95% alike
    texts = [first, near, other, other[:300] + text()[300:]]
    similarity = [jaccard(first, near), jaccard(first, other), jaccard(other, texts[3])]
    assert similarity[0] > 0.94
    assert max(similarity[1:]) < 0.3
    reasons = judge(new_index(0.8), sha256(texts), minhash(texts, 42))
    assert reasons == [None, NEAR, None, None]


def corpus(seed, clusters=90, copies=6):
    """Returns prints of clusters, shuffled, of all similarities, some equal, some without words."""
    random = np.random.RandomState(seed)
    digests = random.randint(0, 2**64, clusters * copies, np.uint64)
    centres = random.randint(0, 2**32, (clusters, PERMUTATIONS), np.uint64)
    signatures = centres.repeat(copies, axis=0)
    share = random.rand(len(signatures), 1) ** 2 * 0.4
    noise = random.randint(0, 2**32, signatures.shape, np.uint64)
    signatures = np.where(random.rand(*signatures.shape) < share, noise, signatures)
    signatures[random.rand(len(signatures)) < 0.02] = 0xFFFFFFFF
    order = random.permutation(len(signatures))
    order[random.rand(len(order)) < 0.1] = order[0]
    return digests[order], signatures.astype(np.uint32)[order]


def brute_force(digests, signatures, threshold):
    """Compares everyone with everyone kept, where a band and enough places are equal."""
    (bands, rows), reasons, seen = band_shape(threshold), [], set()
    kept = np.empty((0, PERMUTATIONS), np.uint32)
    for digest, signature in zip(digests, signatures, strict=True):
        equal = kept == signature
        band = equal[:, : bands * rows].reshape(-1, bands, rows).all(axis=2).any(axis=1)
        words = (signature != 0xFFFFFFFF).any()
        near = words and (band & (equal.mean(axis=1) >= threshold)).any()
        reasons.append(EXACT if digest in seen else NEAR if near else None)
        seen.add(digest)
        if words and reasons[-1] is None:
            kept = np.vstack([kept, signature])
    return reasons


@pytest.mark.parametrize("threshold", [0.8, 0.6, 0.95])
def test_decides_as_brute_force_does_in_batches_of_any_size(threshold, new_index):
    prints = corpus(7)
    expected = brute_force(*prints, threshold)
    assert all(count > 20 for count in Counter(expected).values())
    for sizes in [(500,), (1,), (7, 300, 1, 64)]:
        assert judge(new_index(threshold), *prints, sizes) == expected


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, new_index):
    random, (digests, signatures) = np.random.RandomState(3), corpus(8)
    whole, folder = new_index(0.8), tmp_path / "cut"
    expected = judge(whole, digests, signatures)
    folder.mkdir()
    reasons, sizes = [], []
    while len(reasons) < len(digests):
        for path, size in sizes:
            os.truncate(path, size)
        index = index_in(folder, 0.8)
        for _ in range(random.randint(1, 4)):
            batch = slice(len(reasons), len(reasons) + random.randint(1, 90))
            reasons += index.judge(digests[batch], signatures[batch])
        files = index.digest_file, index.signature_file
        sizes = [(file.name, file.tell()) for file in files]
        lost = slice(len(reasons), len(reasons) + random.randint(1, 90))
        index.judge(digests[lost], signatures[lost])
        index.digest_file.flush()
    assert reasons == expected
    whole.digest_file.flush()
    assert bytes_of(index_in(folder, 0.8)) == bytes_of(whole)
    for name in ("digests", "signatures"):
        assert (folder / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_memory_is_as_stated(new_index):
    random, count = np.random.RandomState(1), 10_000
    digests = random.randint(0, 2**64, count, np.uint64)
    signatures = random.randint(0, 2**32, (count, PERMUTATIONS), np.uint64).astype(np.uint32)
    index = new_index(0.8)
    tracemalloc.start()
    try:
        assert judge(index, digests, signatures) == [None] * count
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bytes_of(index) == 72 * count
    assert held < 100 * count


@pytest.fixture(scope="module")
def real():
    """{id: (text, digest, signature)} of the shared documents."""
    if not PAIRS.is_dir():
        pytest.skip("needs the shared pairs")
    with gzip.open(PAIRS / "docs.dev.jsonl.gz", "rt", encoding="utf-8") as file:
        docs = {row["id"]: row["text"] for row in map(json.loads, file)}
    texts = list(docs.values())
    return dict(zip(docs, zip(texts, sha256(texts), minhash(texts, 42), strict=True), strict=True))


def test_labelled_pairs_lose_their_second_document(real, new_index):
    alike, apart = [], []
    for pair in map(json.loads, (PAIRS / "pairs.dev.jsonl").read_text().splitlines()):
        _, digests, signatures = map(np.stack, zip(real[pair["a"]], real[pair["b"]], strict=True))
        goes = new_index(0.8).judge(digests, signatures)[1] is not None
        if not 0.7 <= pair["w5"] < 0.9:
            (alike if pair["w5"] >= 0.9 else apart).append(goes)
    assert np.mean(alike) >= 0.995
    assert np.mean(apart) <= 0.002
