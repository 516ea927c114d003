"""Cuts a text at its paragraphs, lines, sentences or words."""

import re
from itertools import chain

# Where a text may be cut, the best first: behind a paragraph, a line, a sentence, a word
ENDS = (
    r"\n\s*\n",
    r"\n",
    # with a blank behind it, or in a script that sets none or has a stop of its own
    "[.!?\u2026][\"'\u2019\u201d\u00bb)\\]]*\\s"
    "|[\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u104b\u17d4]"
    "[\"'\u2019\u201d\u300d\u300f\uff09)]*\\s*",
    r"\s",
)
ENDS = [(re.compile(f"(?s:.*)(?:{border})"), re.compile(border)) for border in ENDS]


def cut_at(text, low, best, high):
    """Returns where to cut a text: behind what ends nearest to `best`, from low + 1 to high.

    A paragraph if one ends there, else a line, sentence or word; if none does, `best`.
    """
    for to_last, border in ENDS:
        before = to_last.match(text, low, best)
        after = high > best and border.search(text, before.end() if before else low, high)
        if ends := [match.end() for match in (before, after) if match]:
            return min(ends, key=lambda end: abs(end - best))
    return best


def pieces(parts, max_length):
    """Yields a text, which comes in parts, in pieces of at most max_length characters.

    Joined they are the text. Each has a quarter of max_length at least, so that nothing is lost as
    too short. No more than a part and 2 * max_length characters are held.
    """
    text = ""
    for part in chain(filter(None, parts), [""]):  # "": the text ends
        text += part
        start, limit = 0, max_length * (2 if part else 1)
        while (rest := len(text) - start) > limit:
            best = min(max_length, (rest + 1) // 2)  # the last two share what is left
            low, high = best // 2, min(max_length, rest - best // 2)
            end = cut_at(text, start + low, start + best, start + high)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text
