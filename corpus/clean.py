"""Cleaning and filters: one raw document in, the text a model should see out, or the reason to drop it.

Everything here is a pure function of a text and its settings, linear in the length of the text whatever the
text, and cheap where there is nothing to do: a repair is only tried where a substring search, at memory
speed, finds what it repairs. Control strings of a chat template are left as they are: ftfy can even make them
out of harmless characters, and it is the tokenizer that keeps text from becoming control.
"""

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from ipaddress import IPv6Address
from typing import Literal

from lib.config import Fraction, NonNegativeInt, PositiveInt, UserError


@dataclass(frozen=True)
class CleanConfig:
    """What to take out of a document, and which documents to drop."""

    remove_urls: bool = True  # take web addresses out; the text of a link stays
    # remove: fenced and `inline` code goes; blocks: fenced only; keep: neither
    code: Literal["remove", "blocks", "keep"] = "remove"
    mask_private: bool = True  # [EMAIL], [PHONE], [IP], [CARD], [KEY] in place of the real ones
    min_length: NonNegativeInt = 50  # characters; shorter documents are dropped
    # characters; longer documents are dropped, longer plain-text files cut
    max_length: PositiveInt = 10000
    # the language to keep: en, off (any), or, with py3langid, another ISO 639 code
    language: str = "en"
    language_threshold: Fraction = 0.7  # the score from which a document counts as of that language
    # builtin: words and spelling, English only; py3langid: the package, most languages
    language_detector: Literal["builtin", "py3langid"] = "builtin"
    quality: bool = True  # drop documents that look like no prose: repetition, symbols, markup
    quality_off: tuple[str, ...] = ()  # rules of quality that shall not act, by name

    def __post_init__(self):
        for name in self.quality_off:
            if name not in QUALITY:
                raise UserError(f"quality_off: no rule {name!r}; there are {', '.join(QUALITY)}")
        if self.language_detector == "builtin" and self.language not in ("en", "off"):
            remedy = "for any other language set language_detector=py3langid"
            raise UserError(f"language must be en or off, got {self.language!r}; {remedy}")


# --- Cleaning -----------------------------------------------------------------------------------------------

ROUNDS = (
    8  # one repair may expose what another repairs; what still changes after so many is no text
)


def clean(text, cfg):
    """Text repaired by ftfy, without what nobody sees, code, web addresses and private data; paragraphs stay.

    The steps are repeated until they find nothing more to do, hence clean(clean(text)) == clean(text); a text
    that never stops changing was made that way, and nothing of it is kept.
    """
    for _ in range(ROUNDS):
        text = repaired(text)
        rest = without_unwanted(text, cfg)
        if rest == text:
            return text
        text = rest
    return ""


def repaired(text):
    """Text with its characters and lines in order, whatever else is in it."""
    for _ in range(ROUNDS):
        before, text = text, tidy(visible(fix_encoding(plain_lines(text))))
        if text == before:
            return text
    return ""


def without_unwanted(text, cfg):
    """A repaired text without what the settings name."""
    if cfg.code != "keep" and ("```" in text or "~~~" in text):
        text = without_fenced(text)
    if cfg.code == "remove" and "`" in text:
        text = INLINE.sub(HOLE, text)
    if cfg.remove_urls and ("://" in text or "www." in text):
        text = URL.sub(url_hole, text)
    if HOLE in text:
        text = closed(text)
    return mask_private(text) if cfg.mask_private else text


# Terminal control sequences (ECMA-48 5.4): CSI with parameters, OSC up to its end, two-character escapes.
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[@-Z\\^_])")


def plain_lines(text):
    """The text with line ends as \\n, without terminal colours and the double letters of a printed manual."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\b" in text:
        text = re.sub("[^\n]\b", "", text)  # nroff's bold: a letter, backspace, the letter again
    return ESCAPE.sub("", text) if "\x1b" in text else text


# What ftfy would repair: character references, control characters, and beyond ASCII whatever does not stand
# alone (Latin letters and signs), nor among its kind (quotes and dashes; emoji; Greek, Cyrillic, CJK). Bytes
# are looked through by bytes.translate, which takes a tenth of the time of a pattern.
REFERENCE = re.compile(r"&#?[0-9A-Za-z]{1,24};")
NO_CONTROL = bytes(set(range(256)) - ({*range(32), 127} - {9, 10}))
NO_DIGITS = bytes(set(range(256)) - set(b"0123456789"))
BLANK_ASCII = bytes(32 if byte < 128 else byte for byte in range(256))
QUIET = re.compile(
    "[\u00a1-\u00c1\u00c4-\u0131\u0134-\u0148\u014a-\u0151\u0154-\u017e\u2022\u20ac\u2122]"
    "|[\u00a0\u200b\u2010-\u2014\u2026\u2018\u2019\u201c\u201d]+"
    "|[\u2190-\u21ff\u2600-\u27bf\u200d\ufe0f\U0001f300-\U0001faff]+"
    "|[\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0401\u0410-\u044f\u0451"
    "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\u3001\u3002]+"
)
NESTED = re.compile(r"&(?:(?:amp|#38);){2,}")  # ftfy would take one layer at a time


def fix_encoding(text):
    """ftfy.fix_text, with the same result and without its cost for what it would leave alone."""
    if not needs_ftfy(text):
        return uncurled(text)
    import ftfy

    lines, config = text.split("\n"), ftfy.TextFixerConfig(explain=False)
    for number, line in enumerate(lines):
        if "<" in line:  # ftfy, too, reads entities as such only up to the first tag
            config = config._replace(unescape_html=False)
        if needs_ftfy(line):
            line = NESTED.sub("&amp;", line) if config.unescape_html else line
            end = "\n" if number + 1 < len(lines) else ""  # ftfy looks at a line with its end
            lines[number] = ftfy.fix_text(line + end, config).removesuffix(end)
        else:
            lines[number] = uncurled(line)
    return "\n".join(lines)


def needs_ftfy(text):
    """May ftfy change more of this text than its quotation marks?"""
    if text.encode("utf-8", "surrogatepass").translate(None, NO_CONTROL):
        return True
    if "&" in text and REFERENCE.search(text):
        return True
    return not (text.isascii() or all(map(QUIET.fullmatch, beyond_ascii(text))))


def beyond_ascii(text):
    """The different runs of characters beyond ASCII."""
    runs = set(text.encode("utf-8", "surrogatepass").translate(BLANK_ASCII).split())
    return [run.decode("utf-8", "surrogatepass") for run in runs]


def uncurled(text):
    if text.isascii():
        return text
    text = text.replace("\u2018", "'").replace("\u2019", "'")
    return text.replace("\u201c", '"').replace("\u201d", '"')


# Zero-width and bidirectional marks, the soft hyphen, tags that spell hidden text, and the control characters
# that ftfy keeps; every kind of blank becomes a space.
INVISIBLE = [
    0xAD,
    0x61C,
    0x180E,
    0x200B,
    0x200E,
    0x200F,
    0xFEFF,
    *range(0x80, 0xA0),
    *range(0x202A, 0x202F),
]
INVISIBLE = dict.fromkeys(
    map(chr, [*INVISIBLE, *range(0x2060, 0x206A), *range(0xE0000, 0xE0080)]), ""
)
BLANKS = [0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x2800, 0x3000, 0x3164]
INVISIBLE |= dict.fromkeys(map(chr, BLANKS), " ")
# Emoji and several scripts are spelled with the zero-width joiners; between other letters they are dirt.
JOINER = re.compile(
    r"(?<![\u0600-\u0dff\u1000-\u17ff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]+"
)


def visible(text):
    """Text with blanks for every kind of blank, and without the characters that show nothing."""
    text = text.replace("\f", "\n")
    if not text.isascii():
        found = set().union(*beyond_ascii(text))
        for char in INVISIBLE.keys() & found:
            text = text.replace(char, INVISIBLE[char])
        if found & {"\u200c", "\u200d"}:
            text = JOINER.sub("", text)
    return text


def tidy(text):
    """The text without blanks at the ends of lines, empty lines at its ends, or two of them together."""
    if " \n" in text or "\t\n" in text:
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip("\n").rstrip()


# --- Code and web addresses ---------------------------------------------------------------------------------

HOLE = (
    "\0"  # stands for what was taken out, until `closed` has looked around it; `visible` left none
)
FENCE = re.compile(r"(?m)^[ \t>]*+(`{3,}+|~{3,}+)[ \t]*+([^`\n]*)$")
# `words` between backticks on one line, with a plural's s; not the quotations `this' and ``that''
INLINE = re.compile(r"(`(?<![\w`\\].)`{0,2}+)(?!\s)[^`\n]{1,200}+(?<!\s)\1(?:e?s\b)?(?![`\w])")
URL = re.compile(
    r"[A-Za-z](?<![\w+.-].)(?:[A-Za-z0-9+.-]{1,11}://|(?<=[Ww])ww\.)(?!\s)[^\s<>\[\]{}|\\^`\"\0]+"
)


def without_fenced(text):
    """Text without its fenced code (CommonMark 4.5); a fence that nothing closes is left alone.

    A text may begin within a block, where it was cut: a fence that names a language always opens one.
    """
    kept, start, opened = [], 0, None
    for fence in FENCE.finditer(text):
        mark, info = fence[1], fence[2].strip()
        if opened and mark.startswith(opened[1]) and not info:
            kept.append(text[start : opened.start()])
            start, opened = fence.end() + 1, None
        elif opened is None or (info and mark.startswith(opened[1])):
            underline = mark[0] == "~" and text[max(0, fence.start() - 2) : fence.start()].strip(
                "\n"
            )
            opened = (
                None if underline else fence
            )  # tildes under a line are a heading of reStructuredText
    return "".join([*kept, text[start:]])


def url_hole(match):
    """A hole for a web address, and the punctuation that ends the sentence and not the address."""
    url = match[0]
    stem = url.rstrip(".,;:!?'*_~)")
    if stem.endswith("//"):
        return url
    if url.startswith(")", len(stem)) and stem.count("(") > stem.count(")"):
        stem += ")"
    return HOLE + url[len(stem) :]


HOLES = re.compile(r"\0(?:[ \t]{0,3}[,;|/]?[ \t]{0,3}\0)+")
LINK = r"\[([^\[\]\n]{0,300})\]\( ?\0[^()\n]{0,200}\)"
IMAGE, LINK = re.compile("!" + LINK), re.compile(LINK)
WRAPS = ("()", "[]", "{}", "<>", '""', "''", "**", "__")
# the beginning of a line that holds nothing but a bullet or the name of a reference, and such a line's end
BULLET = re.compile(
    r"[ \t>]*+(?:(?:[-*+]|\.\.|\d{1,3}[.)])[ \t]++)?(?:\[[^\[\]\n]{1,80}\]:?[ \t]*+)?"
)
LINE_END = re.compile(r'[ \t]*+(?:"[^"\n]{0,200}")?[ \t.,;:]*+(?:\n|\Z)')


def closed(text):
    """Text whose holes are closed: no empty brackets, bullets or double spaces where something was."""
    text = LINK.sub(r"\1", IMAGE.sub(r"\1", HOLES.sub(HOLE, text)))
    first, *rest = text.split(HOLE)
    pieces = [first]
    for right in rest:
        left = pieces.pop()
        while pieces and not left:
            left = pieces.pop()
        pieces += joined(left, right, first=not pieces)
    return "".join(pieces)


def joined(left, right, first):
    """The two sides of a hole, made to meet; `first`: nothing stands before `left`."""
    for _ in range(3):  # brackets deeper than that are no brackets
        if left[-1:] + right[:1] in WRAPS:
            left, right = left[:-1], right[1:]
    start = left.rfind("\n") + 1
    line, rest = left[start:], right.lstrip(" \t")
    if (start or first) and BULLET.fullmatch(line):
        if end := LINE_END.match(right):
            return left[:start], right[end.end() :]
        return left, rest if line.strip() else rest.lstrip(".,;:!?").lstrip(" \t")
    if not rest or rest[0] in "\n.,;:!?)]}":
        return left.rstrip(" \t"), rest
    if left[-1:] in "([{":
        return left, rest
    glued = (
        left[-1:] not in " \t" and rest == right and not (left[-1:].isalnum() and rest[0].isalnum())
    )
    return left.rstrip(" \t"), rest if glued else " " + rest


# --- Private data -------------------------------------------------------------------------------------------

# A line is looked at if it holds an @, a digit beside a letter (as keys do), or digits enough.
SUSPECT = re.compile(
    r"[0-9@](?:(?<=@)|[A-Za-z_:]|(?<=[A-Za-z_:].)|\.[0-9]{1,3}\.[0-9]{1,3}\.|(?:[ .()/-]{0,2}[0-9]){5})"
)
PEM = re.compile(  # whole, or as much of it as there is
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"(?:(?:[^-]|-(?!----))*+-----END [A-Z ]{0,30}PRIVATE KEY-----|(?:\s++[A-Za-z0-9+/=]{40,}+)*+)"
)
KEY = re.compile(  # the shapes that the issuers of keys publish, so that a leaked one is found
    r"(?<![\w-])(?:"
    r"sk-(?=[\w-]{0,60}[0-9])[\w-]{20,}+"  # OpenAI, Anthropic
    r"|gh[pousr]_[A-Za-z0-9]{36,}+|github_pat_\w{22,}+|glpat-[\w-]{20,}+"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?!\w)|AIza[\w-]{35}(?!\w)"  # AWS, Google
    r"|xox[abeoprs]-[\w-]{10,}+|hf_[A-Za-z0-9]{30,}+"  # Slack, Hugging Face
    r"|eyJ[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]{8,}+)"  # JSON Web Token (RFC 7519)
)
# RFC 5321 within reason; not git@host, nor pictures named icon@2x.png
EMAIL = re.compile(
    r"(?<![\w.+%-])(?!git@)[\w.+%-]{1,64}+@(?:[A-Za-z0-9-]{1,63}\.){1,8}(?!(?:png|jpg|gif|svg)\b)[A-Za-z]{2,24}\b"
)
IPV4 = re.compile(r"[0-9](?<![\w.].)[0-9]{0,2}+(?:\.[0-9]{1,3}+){3}(?!\w|\.\w|-[A-Za-z])")
IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
CARD = re.compile(
    r"(?<![\w.,-])[2-6](?:[0-9]{12,18}+"
    r"|[0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?|[0-9]{6}\1[0-9]{4,5}|"
    r"[0-9]{3}\1[0-9]{3}\1[0-9]{3}))(?!\w|[.,-][0-9])"
)
PHONE = re.compile(
    r"(?<![\w.,/+#$-])(?:"
    r"\+[1-9](?:[ .()/-]{0,2}[0-9]){7,14}"  # international (E.164, E.123)
    r"|(?:1[ .-])?(?:\([0-9]{3}\)[ -]?|[0-9]{3}[.-])[0-9]{3}[ .-][0-9]{4}"  # North America
    r"|(?<![0-9] )(?:1 )?[2-9][0-9]{2} [2-9][0-9]{2} [0-9]{4}"
    r"|(?<![0-9] )\(?0[1-9][0-9]{0,3}\)?[ /-]"  # most of the others: 0 and the area
    r"(?!(?:19|20)[0-9]{2}\b)[0-9]{3,4}[ -]?[0-9]{3,5}"
    r"|(?<![0-9] )0[1-9](?:[ .-][0-9]{2}){4}"  # France
    r"|00[1-9][0-9]{0,2}(?:[ .-][0-9]{2,5}){2,5}"  # 00 for +
    r")(?!\w|[.,/-][0-9]| [0-9])"
)
NAMED_PHONE = re.compile(  # what is called a telephone number, however it is written
    r"(?i)\b((?:tel|telephone|phone|mobile|cell|fax|call|whatsapp)s?\b[.:]?"
    r"(?: (?:no\.?|number|us|me|at|is|on)){0,2}:? {0,2})"
    r"(?=[(0-9]{1,5}[ .()-]|[0-9]{9})\(?[0-9](?:[ .()-]{0,2}[0-9]){5,13}(?!\w|[.,-][0-9])"
)


def mask_private(text):
    """Text with e-mail addresses, IP addresses, keys, card and phone numbers each as a word in brackets."""
    if "-----BEGIN" in text:
        text = PEM.sub("[KEY]", text)
    if "@" not in text and not text.encode("utf-8", "surrogatepass").translate(None, NO_DIGITS):
        return text
    kept, at = [], 0
    while match := SUSPECT.search(text, at):
        start, end = text.rfind("\n", at, match.start()) + 1 or at, text.find("\n", match.end())
        end = len(text) if end < 0 else end
        kept += [text[at:start], mask_line(text[start:end])]
        at = end
    return "".join([*kept, text[at:]])


def mask_line(line):
    """A line with what identifies people masked; the longer shapes first, for they hold the shorter."""
    line = KEY.sub("[KEY]", line)
    if "@" in line:
        line = EMAIL.sub("[EMAIL]", line)
    if line.count(":") > 1:
        line = IPV6.sub(mask_ipv6, line)
    line = IPV4.sub(mask_ipv4, line)
    line = CARD.sub(lambda match: "[CARD]" if luhn(match[0]) else match[0], line)
    return NAMED_PHONE.sub(r"\1[PHONE]", PHONE.sub(mask_phone, line))


VERSION = re.compile(
    r"(?i)(?:\b(?:v|vers?|versions?|release|rev|revision|build|section|sec|chapter|rfc|kernel)[.:-]? ?"
    r"|[<>=~^!]= ?|[<>^~] ?)\Z"
)
TITLE = re.compile(r"\.[ \t]|\.?[ \t]{1,4}[A-Z]")


def mask_ipv4(match):
    """Four numbers below 256, but not a version, which a word or operator before them tells; not the number
    of a section, small and first in its line, with a title after it; not this host (127), nor a mask (255).
    """
    line, start, end = match.string, match.start(), match.end()
    parts = [int(part) for part in match[0].split(".")]
    if (
        max(parts) > 255
        or parts[0] in (0, 127, 255)
        or VERSION.search(line[max(0, start - 12) : start])
    ):
        return match[0]
    first = start < 12 and not line[:start].strip(" \t#*>")
    return match[0] if first and max(parts) < 64 and TITLE.match(line, end) else "[IP]"


def mask_ipv6(match):
    """What Python reads as an address, with a group that makes it no slice and no path of names."""
    groups = [group for group in match[0].split(":") if group]
    try:
        IPv6Address(match[0])
    except ValueError:
        return match[0]
    plain = len(groups) < 3 and match[0].replace(":", "").isdigit()
    return match[0] if plain or not any(len(group) > 2 for group in groups) else "[IP]"


def mask_phone(match):
    """A number whose groups could be those of a telephone number; not +1.5, not a list of small numbers."""
    groups = re.findall("[0-9]+", match[0])
    if match[0][0] == "+":
        if len(groups) == 1 and len(groups[0]) < 10:
            return match[0]
        if max(map(len, groups[1:]), default=2) < 2 or re.fullmatch(r"\+[0-9]+\.[0-9]+", match[0]):
            return match[0]
    return "[PHONE]"


def luhn(number):
    """Does the check digit hold (ISO/IEC 7812-1 annex B)?"""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    return sum(digits[::2] + [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]) % 10 == 0


# --- Language -----------------------------------------------------------------------------------------------

# The commonest words of English, then of the languages written in Latin letters; a word of both says nothing.
ENGLISH_WORDS = """
    the of and in he to that is was for it with as his on be at by this had not are but from or have an
    they which one you were her all she there would their we him been has when who will more no if out so
    said what up its about into than them can only other new some could time these two may then do first
    any my now such like our over even most after also did many before must through back where much your
    well should because each just those how too very make does here while again between under always never
    see use used using being both same own another every however without against during until though since
    upon still might shall less few often off down per yet whether either neither else once within around
    above below given following example examples return returns value values function name names file
    files set object class type number list need needs way know get gets take made people world years day
    man good great little think came come went go going us me am don things something nothing anything
    work part place right long old different available note default contains means called change
    information system"""
FOREIGN_WORDS = """
    der die das und nicht ein eine einen einer eines dem des den von sich auf für im auch es wird sind wie
    oder aber bei nach nur noch aus werden kann wenn sie ihre durch über zur zum vom wurde le la les est
    une un dans qui pas ce il au aux sur ne sont avec cette mais nous vous elle être par que du ou se ces
    leur peut tout si el los las del en por con una su como más pero sus ya este esta puede fue para no as
    da do em um uma não ao foi ser são pela pelo nos também seu sua di gli che della per sono nel dei
    delle alla anche questo più come sulla dal de het een van niet zijn voor dat te ook maar aan deze
    wordt naar worden bij uit och att det som är av för inte han eller kan om på från ett jag og af ikke
    hun fra vil blir ikkje frå eit skal til ja on ei että hän oli ovat tai kun mutta joka myös ole voi
    tämä jos sekä see ning või kui oma tema mis ir ar uz kas vai tas nav yra kad kaip iš arba się na jest
    nie to że jak tak ale przez są jako dla oraz po je že by byl nebo jsou které aby při sa ako alebo sú
    pri ktoré in za ki ali kot ili što od koji kao može biti svako ima ovo iz nije și în cu nu pe sau să
    pentru din az és hogy nem egy ez vagy csak minden bir bu için ile olarak olan her gibi veya daha və
    üçün dhe të në me një për që nuk është nga eta dira ere izan edo duen els amb va seva dret als unha ás
    yr yn mae gan neu wedi bod ag agus bhí gach chun tha hag eo að er ekki sem við það eða hann wat vir sy
    deur it foar mei hy déi vun kaj estas ĉiu cum ut quod sed esse ta li jew għandu dan ma kull yang untuk
    dengan ini tidak pada dari dalam adalah atau akan oleh setiap ke ang ng mga ay hindi kung kanyang và
    của là có được trong cho các người với những một wa kwa ni katika kuwa kila haki iyo waa ka ku uu uga
    he ko hai mein aur ek blong long mo ol olgeta wan hemi kat sipos nomo bilong olsem wanpela dispela
    narapela mas gat dey wey sey dɛn ɛn fɔ nɔ we an aw tae wi frae hae maun ilka nae fowk aa ony fi yu
    thir thair richt richts wull whit awbody gie wha oor mair sic shoud anoda pipol wetin everi"""
SPELLING_MARKS = """
    _th the he_ ed_ _of of_ nd_ _to tio ly_ _an ing ion to_ is_ on_ and _in his hat _wh thi es_ wit in_
    her ted _co _wi for tha _it ng_ re_ th_ _be ts_ ith _is st_ you ll_ _fo or_ _on not all ons be_ ld_
    ry_ _as rs_ use at_ by_ tho ce_ ns_ er_ ati ate _ex ve_ cti ow_ nce it_ whe fro uld ect me_ ct_ our
    wil _by nt_ whi _ca _yo _us oul ty_ _we ch_ ers ot_ le_ _fr _or ple ble ut_ can eat unc age ss_ ds_
    _if hic _st was con mpl ack oun oth abl com nct ity ill hav ive rea eve ess are rom se_ ame _fu _sh
    ere _wa ent sed ght ay_ _wo _ha ure ew_ lly low as_ my_ ter fun out hou cou _ar _he ugh tur _ou ey_
    now but sio ain exp ded ust ave ear igh ic_ pro nly ssi res hen hey tly oug urn nts _ty we_ ous if_
    _al sho lue ome enc ge_ ned rou ose new _ea _ev cka eas tic ore int ver tin who onl ces _sp _cl wor
    ee_ ery equ own ove ide fie _ac ass lf_ cal xam ead jec ary _no rat lso ou_ how ref hes pec als omm
    wou exa ase omp _so kag ck_ nst _hi war eed ny_ pac cat ely has any act row ace ult ms_ lea ies ule
    ric pti _up app hon han les uct cod elf pla ard ort _ru duc llo ins req _cr _ch ope met spe eco pre
    _ho ses tri om_ thr imp mus suc tim ful _my odu pe_ its see gh_ gs_ mor xpr tai uil uch od_ _ot owe
    nal ork tab _fi _su eth cts hil ild ls_ cla red etu nam din cre add led ory way rn_ ht_ nat ps_ two
    oin iti ree ws_ ays ict een bec ook fte ept rec bui up_ ize rds lat rd_ gre rop bee sec sin ret nds
    clu ows iou str anc _wr alu dis she hos rce ppo ner qui som _lo mbe _ag _pl so_ ine rie fir ep_ wn_
    win cur ood _ab exc fac efo ray eci nin _tw fer ced mes fea art ues def cep tat"""
ENGLISH, FOREIGN = frozenset(ENGLISH_WORDS.split()), frozenset(FOREIGN_WORDS.split())
SPELLING = frozenset(mark.replace("_", " ") for mark in SPELLING_MARKS.split())
WORD = re.compile(r"[^\W\d_]{2,}")
LETTERS_AND_BLANKS = bytes(
    byte for byte in range(256) if byte > 127 or chr(byte).isalpha() or byte in b" \n\t"
)
LETTERS = bytes(byte if byte > 127 or chr(byte).isalpha() else 32 for byte in range(256))
SAMPLE = 500  # characters from each of the beginning, the middle and the end


@lru_cache(1 << 16)
def evidence(word):
    """How much a word in lower case speaks for English (1: one of its common words) or against it (-2)."""
    if len(word) == 1:
        return 0.0
    if word in ENGLISH:
        return 0.5 if word in FOREIGN else 1.0
    if word in FOREIGN:
        return -2.0
    if not word.isascii():
        parts = WORD.findall(word)
        return -len(word) / 7 if parts == [word] else sum(map(evidence, parts))
    padded = f" {word} "
    return sum(padded[at : at + 3] in SPELLING for at in range(len(word))) / len(word) - 0.15


def english_score(text):
    """How English a text is, 0 to 1, from the words of its beginning, middle and end.

    E / (E + F + 0.02 N): E the evidence for English, F that against it, of N words; the last term keeps a
    handful of words from deciding. A text in two languages gets about the share of its words that is English:
    at a threshold of 0.7, one with a foreign paragraph to two English ones goes.
    """
    if len(text) > 3 * SAMPLE:
        middle = len(text) // 2 - SAMPLE // 2
        text = f"{text[:SAMPLE]} {text[middle : middle + SAMPLE]} {text[-SAMPLE:]}"
    values = list(map(evidence, text.lower().encode().translate(LETTERS).decode().split()))
    size, balance = sum(map(abs, values)), sum(values)  # E + F, E - F
    return (size + balance) / 2 / (size + 0.02 * len(values)) if size else 0.0


@cache
def langid():
    """py3langid's model, loaded once in each process; UserError without the package."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except (ImportError, AttributeError):  # before 0.4 the model was a pickle
        needs = "language_detector=py3langid needs the package, 0.4 or later"
        raise UserError(f"{needs}: pip install -U py3langid") from None


def language_score(text, cfg):
    """How sure the detector is that the text is in cfg.language, 0 to 1."""
    if cfg.language_detector == "builtin":
        return english_score(text)
    scores = dict(langid().rank(text))
    if cfg.language not in scores:
        raise UserError(
            f"language {cfg.language!r}: py3langid knows {', '.join(sorted(scores))}, and off"
        )
    return float(scores[cfg.language])


# --- Filters ------------------------------------------------------------------------------------------------


@dataclass
class Document:
    """What the rules of quality look at, made once."""

    text: str
    words: list  # split at blanks, in lower case
    lines: list  # without blank ones

    @classmethod
    def of(cls, text):
        return cls(
            text, text.lower().split(), [line for line in map(str.strip, text.split("\n")) if line]
        )


def reject(text, cfg, score=None):
    """Why a cleaned document is not kept: too-short, too-long, not-LANGUAGE, a rule of QUALITY; or None.

    `score`: its language_score, where that is known already.
    """
    if len(text) < cfg.min_length:
        return "too-short"
    if len(text) > cfg.max_length:
        return "too-long"
    if cfg.quality:
        document = Document.of(text)
        for name, fails in QUALITY.items():
            if name not in cfg.quality_off and fails(document):
                return name
    if cfg.language != "off":
        score = language_score(text, cfg) if score is None else score
        if score < cfg.language_threshold:
            return "not-english" if cfg.language == "en" else f"not-{cfg.language}"
    return None


BULLETS = ("- ", "* ", "+ ", "\u2022", "\u00b7", "\u25cf", "\u25aa", "\u2023")


def spaced(doc):
    """Is this text in words of letters known to Gopher's rules, not in a script that writes no spaces?"""
    return len(doc.text.encode()) < 1.5 * len(doc.text)


def word_length(doc):
    """Mean word length outside 3 to 10 characters (Gopher); 20 words or 200 characters at least."""
    if not spaced(doc) or len(doc.text) < 200:
        return False
    return not 3 <= len("".join(doc.words)) / len(doc.words) <= 10


def few_words(doc):
    """Under 80% of the words hold a letter (Gopher; 60% here, for tables stand among good prose)."""
    if len(doc.words) < 20 or not spaced(doc):
        return False
    # characters that are no letters: so many words at most lack one
    signs = len(doc.text.encode().translate(None, LETTERS_AND_BLANKS))
    return signs > 0.4 * len(doc.words) and sum(map(str.islower, doc.words)) < 0.6 * len(doc.words)


def symbols(doc):
    """More than one run of # or of dots to ten words (Gopher counts each #), of 50 words at least."""
    allowed = 0.1 * max(50, len(doc.words))
    marks = doc.text.count("#") + doc.text.count("...") + doc.text.count("\u2026")
    return marks > allowed and len(re.findall(r"#+|\.{3,}|\u2026", doc.text)) > allowed


def bullets(doc):
    """Over 90% of the lines begin with a bullet (Gopher)."""
    starts = sum(line.startswith(BULLETS) for line in doc.lines) if len(doc.lines) >= 10 else 0
    return starts > 0.9 * len(doc.lines)


def ellipses(doc):
    """Over 30% of the lines end with an ellipsis (Gopher)."""
    allowed = 0.3 * len(doc.lines)
    if len(doc.lines) < 5 or doc.text.count("...") + doc.text.count("\u2026") <= allowed:
        return False
    return sum(line.endswith(("...", "\u2026")) for line in doc.lines) > allowed


def repeated_lines(doc):
    """Over 30% of the characters are in lines that repeat an earlier one (Gopher: 20%, which costs verse)."""
    if len(doc.lines) < 5 or len(distinct := set(doc.lines)) == len(doc.lines):
        return False
    characters = sum(map(len, doc.lines))
    return characters - sum(map(len, distinct)) > 0.3 * characters


def repeated_phrases(doc):
    """Over 30% of the word 5-grams repeat an earlier one (after Gopher, which counts characters)."""
    words, count = doc.words, len(doc.words) - 4
    if count < 50:
        return False
    grams = set(zip(words, words[1:], words[2:], words[3:], words[4:], strict=False))
    return count - len(grams) > 0.3 * count


def markup(doc):
    """More than one closing tag to 200 words, three at least: a page that nothing took the text out of."""
    return doc.text.count("</") >= 3 and 200 * len(re.findall("</[A-Za-z]", doc.text)) > len(
        doc.words
    )


def lorem_ipsum(doc):
    """The typesetters' dummy text, once in 1,000 characters (C4: anywhere)."""
    return 1000 * doc.text.count("orem ipsum") > len(doc.text)


# name -> does this document fail? Gopher: Rae et al. 2021, table A1; C4: Raffel et al. 2020, section 2.2
QUALITY = {
    "word-length": word_length,
    "few-words": few_words,
    "symbols": symbols,
    "bullets": bullets,
    "ellipses": ellipses,
    "repeated-lines": repeated_lines,
    "repeated-phrases": repeated_phrases,
    "markup": markup,
    "lorem-ipsum": lorem_ipsum,
}
