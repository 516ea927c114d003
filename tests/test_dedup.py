"""dedup.py: datasketch's signatures, brute force's decisions, in any batches and after kills."""

import gzip
import hashlib
import itertools
import json
import re
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.dedup import (
    GROUP,
    PERMUTATIONS,
    Index,
    band_shape,
    fingerprints,
    minhash,
    sha256,
    shingles,
)
from lib.config import UserError
from tests import SHARED

NEAR, EXACT = "near-duplicate", "exact-duplicate"
PAIRS = SHARED / "dedup"


def prose(number, words=300):
    """Text that shares no 5-gram with another number's."""
    random = np.random.RandomState(number)
    return " ".join(f"{'abcdefghij'[n % 10]}{n:x}" for n in random.randint(0, 10**6, words))


def changed(text, share, seed=0):
    """Returns the text with a share of its words replaced, all in one place."""
    words = text.split(" ")
    count = round(len(words) * share)
    return " ".join([f"new{seed}x{n}" for n in range(count)] + words[count:])


def grams(text):
    """Word 5-grams by hand: the oracle."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def jaccard(a, b):
    return len(grams(a) & grams(b)) / max(1, len(grams(a) | grams(b)))


def judge(index, texts, sizes=(10**9,), seed=42):
    """The reasons of all texts, fed in batches of these sizes, again and again."""
    digests, signatures = fingerprints(texts, seed)
    return judge_prints(index, digests, signatures, sizes)


def judge_prints(index, digests, signatures, sizes=(10**9,)):
    reasons, turn = [], 0
    while len(reasons) < len(digests):
        part = slice(len(reasons), len(reasons) + sizes[turn % len(sizes)])
        reasons += index.judge(digests[part], signatures[part])
        turn += 1
    return reasons


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
    assert [row.tobytes() for row in sha256(texts)] == [
        hashlib.sha256(t.encode()).digest()[:16] for t in texts
    ]
    assert sha256([]).shape == (0, 16)
    assert minhash([], 1).shape == (0, PERMUTATIONS)


def shingle_sets(texts):
    hashes, counts = shingles([text.lower() for text in texts])
    assert len(hashes) == sum(counts)
    return [set(part.tolist()) for part in np.split(hashes, np.cumsum(counts)[:-1])]


@given(
    st.lists(
        st.text(st.sampled_from("ab é\u2014_1\n\u0130\u03a3\0"), max_size=60),
        min_size=1,
        max_size=6,
    )
)
@example(TEXTS)
@settings(max_examples=150, deadline=None)
def test_shingles_are_the_distinct_word_5_grams(texts):
    """Every 5-gram has one hash and every hash one 5-gram, wherever in a batch the text stands."""
    found, expected = shingle_sets(texts), [grams(text) for text in texts]
    assert [len(hashes) for hashes in found] == [len(tuples) for tuples in expected]
    for a in range(len(texts)):
        assert found[a] == shingle_sets(texts[a : a + 1])[0]
        for b in range(a):
            assert len(found[a] & found[b]) == len(expected[a] & expected[b])


def test_a_text_longer_than_what_is_hashed_at_once():
    text = " ".join(prose(n, 3000) for n in range(27))
    assert len(text) > 2 * GROUP
    [all_grams] = shingle_sets([text])
    words = text.split(" ")
    for place in (0, 40_000, len(words) - 5):
        assert shingle_sets([" ".join(words[place : place + 5])])[0] < all_grams
    alone = minhash([text], 1)
    assert (minhash([prose(1), text, prose(2)], 1)[1] == alone).all()


@pytest.mark.parametrize("seed", [1, 42, 2**32 + 5])
def test_signatures_are_datasketchs(seed):
    from datasketch import MinHash

    signatures = minhash(TEXTS, seed)
    for text, signature in zip(TEXTS, signatures, strict=True):
        oracle = MinHash(num_perm=PERMUTATIONS, seed=seed % 2**32, hashfunc=int, scheme="affine32")
        hashes, _ = shingles([text.lower()])
        for value in hashes.tolist():
            oracle.update(value)
        assert signature.tolist() == oracle.hashvalues.tolist()


@pytest.mark.parametrize("unit", ["a", "<", " ", "a ", "\n", "\u200b", "a\u0301", "é "])
def test_a_megabyte_of_anything_passes(unit):
    minhash([unit * (1_000_000 // len(unit))], 1)


# ---- the index


def test_copies_in_any_case_go_and_texts_without_words_stay(tmp_path):
    text = prose(1)
    near, shouted, other = changed(text, 0.05), text.upper(), changed(text, 0.6)
    texts = [text, text, near, near, shouted, other, prose(2), "", "", "...", "?!", "ab", "Ab"]
    expected = [None, EXACT, NEAR, EXACT, NEAR, None, None, None, EXACT, None, None, None, NEAR]
    assert judge(Index(tmp_path, 0.8), texts) == expected
    (tmp_path / "exact").mkdir()
    index = Index(tmp_path / "exact")
    assert index.judge(sha256(texts)) == [EXACT if reason == EXACT else None for reason in expected]
    assert index.checkpoint()["signatures"] == 0
    assert index.nbytes <= 8 * len(texts)


@pytest.mark.parametrize("threshold", [1.0, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.001, 1e-6])
def test_bands_fit_the_threshold(threshold, tmp_path):
    bands, rows = band_shape(threshold)
    assert bands * rows <= PERMUTATIONS
    missed = (1 - threshold**rows) ** bands
    assert missed <= 0.02 or (bands, rows) == (PERMUTATIONS, 1)
    pairs = [
        (prose(n), changed(prose(n), share)) for n in range(8) for share in (0.01, 0.2, 0.5, 0.8)
    ]
    for number, pair in enumerate(pairs):
        folder = tmp_path / str(number)
        folder.mkdir()
        reason, exact = judge(Index(folder, threshold), pair)[1], jaccard(*pair)
        if abs(exact - threshold) > 0.17:  # four sigmas
            assert reason == (NEAR if exact > threshold else None)


def corpus(seed, clusters=90, copies=6):
    """Returns prints of clusters, shuffled, of all similarities, some equal, some without words."""
    random = np.random.RandomState(seed)
    digests = random.randint(0, 256, (clusters * copies, 16)).astype(np.uint8)
    signatures = random.randint(0, 2**32, (clusters, PERMUTATIONS), np.uint64).repeat(
        copies, axis=0
    )
    share = random.rand(len(signatures), 1) ** 2 * 0.4
    noise = random.randint(0, 2**32, signatures.shape, np.uint64)
    signatures = np.where(random.rand(*signatures.shape) < share, noise, signatures).astype(
        np.uint32
    )
    signatures[random.rand(len(signatures)) < 0.02] = 0xFFFFFFFF
    order = random.permutation(len(signatures))
    order[random.rand(len(order)) < 0.1] = order[0]
    return digests[order], signatures[order]


def brute_force(digests, signatures, threshold):
    """Everyone with everyone kept, where a band and enough places are equal."""
    (bands, rows), reasons, seen = band_shape(threshold), [], set()
    kept = np.empty((0, PERMUTATIONS), np.uint32)
    for digest, signature in zip(digests, signatures, strict=True):
        equal = kept == signature
        band = equal[:, : bands * rows].reshape(-1, bands, rows).all(axis=2).any(axis=1)
        words = (signature != 0xFFFFFFFF).any()
        near = words and (band & (equal.mean(axis=1) >= threshold)).any()
        reasons.append(EXACT if digest.tobytes() in seen else NEAR if near else None)
        seen.add(digest.tobytes())
        if words and reasons[-1] is None:
            kept = np.vstack([kept, signature])
    return reasons


@pytest.mark.parametrize("threshold", [0.8, 0.6, 0.95])
def test_decides_as_brute_force_does_in_batches_of_any_size(threshold, tmp_path):
    digests, signatures = corpus(7)
    expected = brute_force(digests, signatures, threshold)
    assert all(count > 20 for count in Counter(expected).values())
    for number, sizes in enumerate([(10**9,), (1,), (7, 300, 1, 64)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert judge_prints(Index(folder, threshold), digests, signatures, sizes) == expected


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    random, (digests, signatures) = np.random.RandomState(3), corpus(8)
    (tmp_path / "whole").mkdir()
    whole = Index(tmp_path / "whole", 0.8)
    expected = judge_prints(whole, digests, signatures)
    (tmp_path / "cut").mkdir()
    reasons, state = [], None
    while len(reasons) < len(digests):
        index = Index(tmp_path / "cut", 0.8, state)  # the files hold more than the state says
        for _ in range(random.randint(1, 4)):
            part = slice(len(reasons), len(reasons) + random.randint(1, 90))
            reasons += index.judge(digests[part], signatures[part])
        state = json.loads(json.dumps(index.checkpoint()))
        lost = slice(len(reasons), len(reasons) + random.randint(1, 90))
        index.judge(digests[lost], signatures[lost])
        index.digest_file.flush()
    assert reasons == expected
    index = Index(tmp_path / "cut", 0.8, state)
    assert index.checkpoint() == state == whole.checkpoint()
    assert index.nbytes == whole.nbytes
    for name in ("digests.bin", "signatures.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "cut" / "digests.bin").write_bytes(b"12345678")
    with pytest.raises(
        UserError, match=r"digests.bin: 8 bytes, [\d,]+ were there at the last checkpoint; delete"
    ):
        Index(tmp_path / "cut", 0.8, state)


def test_memory_is_as_stated(tmp_path):
    random, count = np.random.RandomState(1), 10_000
    digests = random.randint(0, 256, (count, 16), np.uint8)
    signatures = random.randint(0, 2**32, (count, PERMUTATIONS), np.uint64).astype(np.uint32)
    index = Index(tmp_path, 0.8)
    tracemalloc.start()
    try:
        assert index.judge(digests, signatures) == [None] * count
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert index.nbytes == 72 * count
    assert held < 100 * count


@pytest.fixture(scope="module")
def real():
    """{id: (text, digest, signature)} of the shared documents."""
    if not PAIRS.is_dir():
        pytest.skip("needs the shared pairs")
    with gzip.open(PAIRS / "docs.dev.jsonl.gz", "rt", encoding="utf-8") as file:
        docs = {row["id"]: row["text"] for row in map(json.loads, file)}
    rows = zip(docs.values(), *fingerprints(list(docs.values()), 42), strict=True)
    return dict(zip(docs, rows, strict=True))


def test_labelled_pairs_lose_their_second_document(real, tmp_path):
    found = {"alike": [], "apart": []}
    for number, line in enumerate((PAIRS / "pairs.dev.jsonl").read_text().splitlines()):
        pair = json.loads(line)
        _, digests, signatures = map(np.stack, zip(real[pair["a"]], real[pair["b"]], strict=True))
        (tmp_path / str(number)).mkdir()
        goes = Index(tmp_path / str(number), 0.8).judge(digests, signatures)[1] is not None
        if not 0.7 <= pair["w5"] < 0.9:
            found["alike" if pair["w5"] >= 0.9 else "apart"].append(goes)
    assert np.mean(found["alike"]) >= 0.995
    assert np.mean(found["apart"]) <= 0.002


def test_real_documents_in_a_row(real, tmp_path):
    """Each document against all that were kept before it, by their sets of 5-grams."""
    texts, digests, signatures = zip(*real.values(), strict=True)
    reasons = Index(tmp_path, 0.8).judge(np.stack(digests), np.stack(signatures))
    holders, sizes, best = defaultdict(list), {}, []
    for place, text in enumerate(texts):
        own = grams(text)
        common = Counter(itertools.chain.from_iterable(holders.get(gram, ()) for gram in own))
        ratios = (count / (len(own) + sizes[other] - count) for other, count in common.items())
        best.append(max(ratios, default=0))
        if reasons[place] is None:
            sizes[place] = len(own)
            for gram in own:
                holders[gram].append(place)
    goes, best = np.array([reason is not None for reason in reasons]), np.array(best)
    assert goes[best >= 0.9].mean() >= 0.995
    assert goes[best < 0.7].mean() <= 0.002
