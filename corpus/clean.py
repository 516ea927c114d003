"""Cleaning and filters: a raw document in, the text for a model out, or the reason to drop it.

Everything here is a pure function of a text and its settings, linear in its length, and cheap where
there is nothing to do: a repair is only tried where a substring search, at memory speed, finds its
cause. Control strings of a chat template stay: the tokenizer keeps text from becoming control.
"""

import io
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from ipaddress import IPv6Address
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal
from unicodedata import is_normalized, normalize

from corpus.files import package
from lib.config import Fraction, NonNegativeInt, PositiveInt, UserError


@dataclass(frozen=True)
class CleanConfig:
    """What to take out of a document, and which documents to drop."""

    normalize_punctuation: bool = False  # ASCII for curly quotes and full-width characters
    remove_urls: bool = True  # take web addresses out; the text of a link stays
    # remove: fenced and `inline` code goes; blocks: fenced only; keep: neither
    code: Literal["remove", "blocks", "keep"] = "remove"
    mask_private: bool = True  # [EMAIL], [PHONE], [IP], [CARD], [KEY] in place of the real ones
    min_length: NonNegativeInt = 50  # characters; shorter documents are dropped
    max_length: PositiveInt = 10000  # characters of a document; plain-text files are cut to it
    # split: cut longer documents too, at paragraphs, else lines, sentences, words; drop them
    too_long: Literal["split", "drop"] = "split"
    # the language to keep: en, off (any), or another ISO 639 code, for which py3langid is needed
    language: str = "en"
    language_threshold: Fraction = 0.7  # the score from which a document counts as of that language
    # drop documents that look like no prose (repetition, symbols, markup), if there are several
    quality: bool = True
    quality_off: "tuple[Literal[*QUALITY], ...]" = ()  # rules of quality that shall not act


# Scripts that put no space between words: Thai to Burmese, Khmer, Chinese and Japanese.
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Korean, too, puts its letters right beside a foreign word; no other alphabet does.
BESIDE = rf"{UNSPACED}\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
LETTER = rf"[^\W{BESIDE}]"


# --- Repair ---------------------------------------------------------------------------------------

ROUNDS = 16  # one repair may expose the next; a text that still changes after so many was made so


def clean(text, cfg):
    """Returns a text repaired, without code, web addresses and private data; paragraphs stay.

    The steps are repeated until none changes anything, hence clean(clean(text)) == clean(text).
    Nothing is kept of a text that never stops changing.
    """
    table = NORMALIZED if cfg.normalize_punctuation else INVISIBLE
    for _ in range(ROUNDS):
        before, text = text, fix_characters(fix_encoding(plain_lines(text)), table)
        text = tidy(text)
        if text != before:
            continue  # only a repaired text is searched for what the settings name
        if cfg.code != "keep" and "```" in text:
            text = without_fenced(text)
        if cfg.code == "remove" and "`" in text:
            text = INLINE.sub(HOLE, text)
        if cfg.remove_urls and ("://" in text or "www." in text):
            text = change_lines(text, ADDRESS, partial(URL.sub, HOLE))
        if HOLE in text:
            text = change_lines(text, HOLES, close_holes)
        if cfg.mask_private:
            text = mask_private(text)
        if text == before:
            return text
    return ""


def plain_lines(text):
    r"""Returns a text with \n at line ends, without nroff's double letters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\f", "\n")
    return re.sub("[^\n]\b", "", text) if "\b" in text else text  # bold: a letter, \b, the letter


# ftfy would change character references, control characters, what is not in normal form C and, of
# the alphabets that mojibake is made of, anything that does not stand alone (Latin letters and
# signs) or among its kind. bytes.translate looks for bytes in a tenth of the time of a pattern.
REFERENCE = re.compile(r"&#?[0-9A-Za-z]{1,24};")
NO_CONTROL = bytes({*range(256)} - {*range(9), *range(11, 32), 127})
NO_DIGITS = bytes({*range(256)} - {*b"0123456789"})
BLANK_ASCII = bytes(32 if byte < 128 else byte for byte in range(256))
QUIET = re.compile(
    "[\u00a1-\u00c1\u00c4-\u0131\u0134-\u0148\u014a-\u0151\u0154-\u017e\u2022\u20ac\u2122]"
    "|[\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0401\u0410-\u044f\u0451]+"
    "|[\u00a0\u0530-\u1fff\u200b\u200d\u2010-\u2014\u2018-\u201e\u2026\u2190-\u21ff\u2600-\u27bf"
    "\u3001-\ud7ff\uf900-\ufaff\ufe0f\uff01-\uffee\U0001f300-\U0001faff]+"
)
# What else ftfy's own steps change; of mojibake it has a pattern, which is slow.
CHANGED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f&\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u2028\u2029"
    "\u206a-\u206f\ud800-\udfff\ufb00-\ufb06\ufeff\ufff9-\ufffc]"
)
NESTED = re.compile(r"&(?:(?:amp|#38);){9,}")  # ftfy would take one layer at a time


def fix_encoding(text):
    """Returns ftfy.fix_text(text) but for its quotes and widths, without its cost for no change."""
    if not needs_ftfy(text):
        return text
    import ftfy
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(explain=False, uncurl_quotes=False, fix_character_width=False)
    lines = []
    for line in io.StringIO(text):
        if "<" in line:  # ftfy, too, reads entities as such only up to the first tag
            config = config._replace(unescape_html=False)
        if needs_ftfy(line) and (
            CHANGED.search(line) or is_bad(line) or not is_normalized("NFC", line)
        ):
            line = ftfy.fix_text(NESTED.sub("&amp;", line), config)
        lines.append(line)
    return "".join(lines)


def needs_ftfy(text):
    """Returns whether ftfy may change a text, at a glance."""
    if not all(map(QUIET.fullmatch, beyond_ascii(text))) or not is_normalized("NFC", text):
        return True
    control = text.encode().translate(None, NO_CONTROL)
    return bool(control or ("&" in text and REFERENCE.search(text)))


def beyond_ascii(text):
    """Returns the different runs of characters beyond ASCII."""
    if text.isascii():
        return []
    runs = set(text.encode("utf-8", "surrogatepass").translate(BLANK_ASCII).split())
    return [run.decode("utf-8", "surrogatepass") for run in runs]


# Every kind of blank becomes a space. Zero-width and bidirectional marks, the soft hyphen, tags
# that spell hidden text, and the control characters that ftfy keeps show nothing.
BLANKS = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x2800, 0x3000, 0x3164]
MARKS = [0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF, *range(0x80, 0xA0)]
MARKS += [*range(0x202A, 0x202F), *range(0x2060, 0x206A), *range(0xE0000, 0xE0080)]
INVISIBLE = dict.fromkeys(map(chr, MARKS), "") | dict.fromkeys(map(chr, BLANKS), " ")
NORMALIZED = INVISIBLE | {wide: normalize("NFKC", wide) for wide in map(chr, range(0xFF01, 0xFFEF))}
NORMALIZED |= dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'")
NORMALIZED |= dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
# Emoji and several scripts are spelled with zero-width joiners; elsewhere they are dirt.
SPELLED_JOINED = r"\u0600-\u0dff\u1000-\u17ff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
JOINER = re.compile(rf"(?<![{SPELLED_JOINED}])[\u200c\u200d]+")


def fix_characters(text, table):
    """Returns a text with the characters of a table replaced, and no joiners that show nothing."""
    characters = set().union(*beyond_ascii(text))
    for character in table.keys() & characters:
        text = text.replace(character, table[character])
    return JOINER.sub("", text) if characters & {"\u200c", "\u200d"} else text


def change_lines(text, sign, change):
    """Returns a text with change(line), or without the line if None, where a pattern matches."""
    kept, at = [], 0
    while match := sign.search(text, at):
        start, end = text.rfind("\n", at, match.start()) + 1 or at, text.find("\n", match.end())
        end = len(text) if end < 0 else end
        line = change(text[start:end])
        kept += [text[at:start], line or ""]
        at = end + (line is None)
    return "".join([*kept, text[at:]])


def tidy(text):
    """Returns a text without blanks at the ends of lines, nor two empty lines together."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n").rstrip()


# --- Code and web addresses -----------------------------------------------------------------------

HOLE = "\0"  # marks a removal until close_holes has looked around it; repaired text holds none
FENCE = re.compile(r"(?m)^[ \t>]*+(`{3,}+)[ \t]*+([^`\n]*)$")
# `words` between backticks on one line, with a plural's s; not the quotations `this' and ``that''
INLINE = re.compile(
    rf"(`(?<!{LETTER}.)(?<![`\\].)`{{0,2}}+)(?!\s)[^`\n]{{1,200}}+(?<!\s)\1(?:e?s\b)?(?!`|{LETTER})"
)
# An address has letters of any alphabet (RFC 3987), but ends at those that need no space before
# them, and at dashes, quotes and full-width punctuation: a sentence goes on there.
ADDRESS = re.compile(r"://|[Ww]ww\.")
BEYOND = (
    rf"\s<>()\[\]{{}}|\\^`\"\0\xab\xbb\u060c\u061b\u061f\u0964\u2014-\u205e\uff00-\uffef{BESIDE}"
)
URL = re.compile(
    rf"[A-Za-z](?<!{LETTER}.)(?<![+.-].)(?:[A-Za-z0-9+.-]{{1,11}}://|(?<=[Ww])ww\.)"
    rf"(?:[^{BEYOND}]|\([^{BEYOND}]*+\))+(?<![.,;:!?'*_~])"
)
HOLES = re.compile(r"\0(?:[ \t]{0,3}[,;|/\u3001\uff0c\uff1b]?[ \t]{0,3}\0)*")
LINK = re.compile(r"!?\[([^\[\]\n]{0,300})\]\( ?\0[^()\n]{0,200}\)")
STOPS = ".,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f\u060c\u061b\u061f\u0964"
ENCLOSING = (
    "()[]{}\uff08\uff09\u3010\u3011\u300a\u300b\u3008\u3009\u300c\u300d\u300e\u300f\u201c\u201d"
)
OPENING, CLOSING = ENCLOSING[::2], ENCLOSING[1::2]
PAIRS = ENCLOSING + "<>\"\"''**__\u2018\u2019\u201e\u201c\xab\xbb"
WRAPPED = re.compile("|".join(f"\\{a}\0\\{b}" for a, b in zip(PAIRS[::2], PAIRS[1::2])))
IN_PAIR = re.compile(rf"\0(?<=[{re.escape(PAIRS[::2])}].)[{re.escape(PAIRS[1::2])}]")
BARE = re.compile(  # a line that held nothing else: a bullet, the name of a reference, its title
    r"[ \t>]*+(?:(?:[-*+]|\.\.|\d{1,3}[.)])[ \t]++)?(?:\[[^\[\]]{1,80}\]:?[ \t]*+)?"
    r'\0[ \t]*+(?:"[^"]{0,200}")?[ \t.,;:]*'
)


def without_fenced(text):
    """Returns a text without code between ``` (CommonMark 4.5); a fence that nothing closes stays.

    A text may begin within a block, where it was cut: a fence that names a language opens one.
    """
    kept, start, opened = [], 0, None
    for fence in FENCE.finditer(text):
        mark, info = fence[1], fence[2].strip()
        if opened and mark.startswith(opened[1]) and not info:
            kept.append(text[start : opened.start()])
            start, opened = fence.end() + 1, None
        elif opened is None or (info and mark.startswith(opened[1])):
            opened = fence
    return "".join([*kept, text[start:]])


def close_holes(line):
    """Returns a line without empty brackets and double spaces, or None if it held nothing else."""
    for _ in range(2):  # a link may hold a picture, and brackets may hold brackets
        line = LINK.sub(r"\1", line) if "](" in line else line
        line = HOLES.sub(HOLE, WRAPPED.sub(HOLE, line) if IN_PAIR.search(line) else line)
    if BARE.fullmatch(line):
        return None
    first, *rest = line.split(HOLE)
    pieces = [first]
    for right in rest:
        pieces[-1:] = close_hole(pieces[-1], right)
    return "".join(pieces)


def close_hole(left, right):
    """Returns the two sides of a hole, made to meet."""
    head, tail = left.rstrip(" \t"), right.lstrip(" \t")
    if not head:  # the first in its line, which stays indented
        return left, tail.lstrip(f" \t{STOPS}")
    if not tail or tail[0] in STOPS + CLOSING:
        return head, tail
    spaced = (head, tail) != (left, right) and head[-1] not in OPENING
    return head, f" {tail}" if spaced else tail


# --- Private data ---------------------------------------------------------------------------------

# A line is looked at if it holds an @, a digit beside a letter (as keys do), or digits enough.
SUSPECT = re.compile(
    r"[0-9@](?:(?<=@)|[A-Za-z_:]|(?<=[A-Za-z_:].)"
    r"|\.[0-9]{1,3}\.[0-9]{1,3}\.|(?:[ .()/-]{0,2}[0-9]){5})"
)
PEM = re.compile(  # whole, or as much of it as there is
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"(?:(?:[^-]|-(?!----))*+-----END [A-Z ]{0,30}PRIVATE KEY-----|(?:\s++[A-Za-z0-9+/=]{40,}+)*+)"
)
KEY = re.compile(  # the shapes that the issuers of keys publish, so that a leaked one is found
    r"(?a)(?<![\w-])(?:"  # a: a letter beyond ASCII may stand beside it
    r"sk-(?=[\w-]{0,60}[0-9])[\w-]{20,}+"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{36,}+|github_pat_\w{22,}+|glpat-[\w-]{20,}+"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)|AIza[\w-]{35}(?!\w)"  # AWS, Google
    r"|xox[abeoprs]-[\w-]{10,}+|hf_[A-Za-z0-9]{30,}+"  # Slack, Hugging Face
    r"|eyJ[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]{8,}+)"  # JSON Web Token (RFC 7519)
)
EMAIL = re.compile(  # RFC 5321 within reason; not git@host, nor pictures named icon@2x.png
    rf"(?<!{LETTER})(?<![.+%-])(?!git@)(?:{LETTER}|[.+%-]){{1,64}}+"
    r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}(?!(?:png|jpg|gif|svg)\b)[A-Za-z]{2,24}(?![A-Za-z0-9_])"
)
IPV4 = re.compile(r"(?a)[0-9](?<![\w.].)[0-9]{0,2}+(?:\.[0-9]{1,3}+){3}(?!\w|\.\w|-[A-Za-z])")
IPV6 = re.compile(r"(?a)(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
CARD = re.compile(
    r"(?a)(?<![\w.,-])[2-6](?:[0-9]{12,18}+"
    r"|[0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5}|"
    r"[0-9]{3}\1[0-9]{3}\1[0-9]{3}))(?!\w|[.,-][0-9])"
)
PHONE = re.compile(
    r"(?a)(?<![\w.,/+#$-])(?:"
    r"\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}"  # international (E.164, E.123)
    r"|(?:1[ .-])?(?:\([0-9]{3}\)[ -]?|[0-9]{3}[.-])[0-9]{3}[ .-][0-9]{4}"  # North America
    r"|(?<![0-9] )(?:1 )?[2-9][0-9]{2} [2-9][0-9]{2} [0-9]{4}"
    r"|(?<![0-9] )\(?0[1-9][0-9]{0,3}\)?[ /-]"  # most of the others: 0 and the area
    r"(?!(?:19|20)[0-9]{2}\b)[0-9]{3,4}[ -]?[0-9]{3,5}"
    r"|(?<![0-9] )0[1-9](?:[ .-][0-9]{2}){4}"  # France
    r"|00[1-9][0-9]{0,2}(?:[ .-][0-9]{2,5}){2,5}"  # 00 for +
    r")(?!\w|[.,/-][0-9]| [0-9])"
)
VERSION = re.compile(  # the word or operator before a version number
    r"(?i)(?:\b(?:v|vers?|versions?|release|rev|revision|build|section|sec|chapter|rfc|kernel)"
    r"[.:-]? ?|[<>=~^!]= ?|[<>^~] ?)\Z"
)
TITLE = re.compile(r"\.[ \t]|\.?[ \t]{1,4}[A-Z]")


def mask_private(text):
    """Returns a text with a word in brackets for each address, key, card or telephone number."""
    text = PEM.sub("[KEY]", text) if "-----BEGIN" in text else text
    if "@" not in text and not text.encode().translate(None, NO_DIGITS):
        return text
    return change_lines(text, SUSPECT, mask_line)


def mask_line(line):
    for mask, sign, pattern, is_private in MASKS:
        if sign.search(line):
            line = pattern.sub(lambda m, w=mask, ok=is_private: w if ok(m) else m[0], line)
    return line


def is_ipv4(match):
    """Returns whether four numbers are an address: below 256, not this host (127), no mask (255).

    A version has a word for it in front; a section has small numbers, first in line, and a title.
    """
    line, start, end = match.string, match.start(), match.end()
    numbers = [int(number) for number in match[0].split(".")]
    is_version = VERSION.search(line[max(0, start - 12) : start])
    if max(numbers) > 255 or numbers[0] in (0, 127, 255) or is_version:
        return False
    first = start < 12 and not line[:start].strip(" \t#*>")
    return not (first and max(numbers) < 64 and TITLE.match(line, end))


def is_ipv6(match):
    """Returns whether Python reads an address; of two groups it is a slice or a path of names."""
    groups = [*filter(None, match[0].split(":"))]
    with suppress(ValueError):
        return len(groups) > 2 and max(map(len, groups)) > 2 and bool(IPv6Address(match[0]))
    return False


def is_phone(match):
    """Returns whether a number is a telephone's: not +1.5, not a list of small numbers."""
    text = match[0]
    first, *others = re.findall("[0-9]+", text)
    if text[0] != "+" or not others:
        return text[0] != "+" or len(first) >= 10
    return max(map(len, others)) > 1 and not re.fullmatch(r"\+[0-9]+\.[0-9]+", text)


def luhn(number):
    """Returns whether the check digit holds (ISO/IEC 7812-1 annex B)."""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
    return sum(digits[::2] + doubled) % 10 == 0


SIX_DIGITS = re.compile(r"[0-9](?:[ .()/-]{0,2}[0-9]){5}")
MASKS = [  # (word, quick sign of it in a line, pattern, check); long shapes hold short ones
    ("[KEY]", re.compile("sk-|gh[pousr]_|github_|glpat-|A[KS]IA|AIza|xox|hf_|eyJ"), KEY, bool),
    ("[EMAIL]", re.compile("@"), EMAIL, bool),
    ("[IP]", re.compile(":[0-9A-Fa-f]{0,4}:"), IPV6, is_ipv6),
    ("[IP]", re.compile(r"\.[0-9]{1,3}\."), IPV4, is_ipv4),
    ("[CARD]", SIX_DIGITS, CARD, lambda match: luhn(match[0])),
    ("[PHONE]", SIX_DIGITS, PHONE, is_phone),
]


# --- Language -------------------------------------------------------------------------------------

LISTS = Path(__file__).with_name("english.txt").read_text(encoding="utf-8").split("\n\n")
ENGLISH, FOREIGN, MARKS_OF_ENGLISH = (frozenset(words.split()) for words in LISTS[1:])
TRIGRAMS = frozenset(tuple(mark.replace("_", " ")) for mark in MARKS_OF_ENGLISH)
WORD = re.compile(r"[^\W\d_]{2,}")
BLANK_OTHERS = bytes(b if b > 127 or chr(b).isalpha() else 32 for b in range(256))
EXCERPT = 500  # characters from each of the beginning, the middle and the end


@lru_cache(1 << 16)
def evidence(word):
    """Returns how much a lower-case word speaks for English (1: a common word) or against (-2)."""
    if len(word) == 1:
        return 0.0
    if word in ENGLISH:
        return 0.5 if word in FOREIGN else 1.0
    if word in FOREIGN:
        return -2.0
    if not word.isascii():
        parts = WORD.findall(word)
        return -len(word) / 7 if parts == [word] else sum(map(evidence, parts))
    trigrams = zip(f" {word}", word, f"{word[1:]} ")
    return sum(map(TRIGRAMS.__contains__, trigrams)) / len(word) - 0.15


def english_score(text):
    """Returns how English a text is, 0 to 1, by the words of its beginning, middle and end.

    E / (E + F + 0.02 N): E the evidence for English, F that against it, of N words; the last term
    keeps a handful of words from deciding. A text in two languages gets about its share of English:
    at a threshold of 0.7 one foreign paragraph to two English ones is too much.
    """
    if len(text) > 3 * EXCERPT:
        middle = len(text) // 2 - EXCERPT // 2
        text = f"{text[:EXCERPT]} {text[middle : middle + EXCERPT]} {text[-EXCERPT:]}"
    values = list(map(evidence, text.lower().encode().translate(BLANK_OTHERS).decode().split()))
    size, balance = sum(map(abs, values)), sum(values)  # E + F, E - F
    return (size + balance) / 2 / (size + 0.02 * len(values)) if size else 0.0


@cache
def language_identifier():
    """Returns py3langid's model, loaded once in each process; UserError without the package."""
    langid = package("py3langid.langid", "a language beside en")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def language_score(text, cfg):
    """Returns how sure the detector is that a text is in cfg.language, 0 to 1."""
    if cfg.language == "en":
        return english_score(text)
    scores = dict(language_identifier().rank(text))
    if cfg.language not in scores:
        languages = ", ".join(sorted(scores))
        raise UserError(f"language {cfg.language!r}: py3langid knows {languages}, and off")
    return float(scores[cfg.language])


# --- Filters --------------------------------------------------------------------------------------


def reject(text, cfg):
    """Returns why a cleaned document is not kept, or None.

    The reasons are too-short, too-long, the rules of QUALITY, and not-english or not-LANGUAGE.
    """
    if len(text) < cfg.min_length:
        return "too-short"
    if len(text) > cfg.max_length:
        return "too-long"
    if cfg.quality:
        words, lines = text.lower().split(), [*filter(None, map(str.strip, text.split("\n")))]
        for name, fails in QUALITY.items():
            if name not in cfg.quality_off and fails(text, words, lines):
                return name
    if cfg.language == "off" or language_score(text, cfg) >= cfg.language_threshold:
        return None
    return "not-english" if cfg.language == "en" else f"not-{cfg.language}"


BULLETS = ("- ", "* ", "+ ", "\u2022", "\u00b7", "\u25cf", "\u25aa", "\u2023")
DOTS = ("...", "\u2026")
NO_SIGNS = bytes(byte for byte in range(128) if chr(byte).isalpha() or chr(byte).isspace())


def has_spaces(text):
    """Returns whether a text is in letters known to Gopher's rules, which take words apart."""
    return len(text.encode()) < 1.5 * len(text)


# Whether a document fails, given its text, its words in lower case and its lines but blank ones.
# Gopher: Rae et al. 2021, table A1; C4: Raffel et al. 2020, 2.2. 12 bytes are a word at least.
QUALITY = {
    # mean word length outside 3 to 10 characters (Gopher), in 200 characters at least
    "word-length": lambda text, words, lines: (
        len(text) >= 200 and has_spaces(text) and not 3 <= len("".join(words)) / len(words) <= 10
    ),
    # under 60% of the words hold a letter (Gopher: 80%, but tables stand among good prose)
    "few-words": lambda text, words, lines: (
        len(words) >= 20
        and len(text.encode().translate(None, NO_SIGNS)) > 0.4 * len(words)  # fast
        and has_spaces(text)
        and sum(map(str.islower, words)) < 0.6 * len(words)
    ),
    # over one run of # or of dots to ten words (Gopher counts each #), of 50 words at least
    "symbols": lambda text, words, lines: (
        sum(map(text.count, ("#", *DOTS))) > 0.1 * max(50, len(words))  # fast
        and len(re.findall(r"#+|\.{3,}|\u2026+", text))
        > 0.1 * max(50, len(words), len(text.encode()) // 12)
    ),
    # over 90% of the lines, of ten at least, begin with a bullet (Gopher)
    "bullets": lambda text, words, lines: (
        len(lines) >= 10 and sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines)
    ),
    # over 30% of the lines, of five at least, end with an ellipsis (Gopher)
    "ellipses": lambda text, words, lines: (
        len(lines) >= 5 and sum(line.endswith(DOTS) for line in lines) > 0.3 * len(lines)
    ),
    # over 30% of the characters, in five lines at least, repeat an earlier line (Gopher: 20%)
    "repeated-lines": lambda text, words, lines: (
        len(lines) >= 5 and 10 * sum(map(len, set(lines))) < 7 * sum(map(len, lines))
    ),
    # over 30% of the word 5-grams, of 50 at least, repeat an earlier one (after Gopher)
    "repeated-phrases": lambda text, words, lines: (
        (count := len(words) - 4) >= 50
        and 10 * len(set(pairwise(words[: count + 1]))) < 7 * count  # fast: pairs are fewer
        and 10 * len(set(zip(*(words[at : at + count] for at in range(5))))) < 7 * count
    ),
    # over one closing tag to 200 words, three at least: a page with its markup still in it
    "markup": lambda text, words, lines: (
        text.count("</") >= 3
        and 200 * len(re.findall("</[A-Za-z]", text)) > max(len(words), len(text.encode()) // 12)
    ),
}


# --- Cuts -----------------------------------------------------------------------------------------

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
