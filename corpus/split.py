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
ENDS = [re.compile(f"(?s:.*)(?:{border})") for border in ENDS]


def cut_at(text, low, high):
    """Returns where to cut a text: behind the last paragraph that ends from low + 1 to high.

    Where none ends there it is a line, sentence or word; without any of them it is `high`.
    """
    ends = (to_last.match(text, low, high) for to_last in ENDS)
    return next((match.end() for match in ends if match), high)


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
            end = cut_at(text, start + best // 2, start + best)
            yield text[start:end]
            start = end
        text = text[start:]
    yield text
