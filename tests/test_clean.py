"""clean.py: what is repaired, masked, dropped, and what must stay; ftfy is the oracle of repair."""

import json
import sys
from dataclasses import replace

import ftfy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.clean import (
    QUALITY,
    CleanConfig,
    clean,
    english_score,
    fix_encoding,
    language_identifier,
    luhn,
    reject,
)
from lib.config import UserError, configure
from tests import SHARED

CFG = CleanConfig()
KEEP = CleanConfig(remove_urls=False, code="keep", mask_private=False)
WRITERS = {"uncurl_quotes": False, "fix_character_width": False}
PROSE = (
    "The lamp on the sill had burned all night, and when the keeper came down in the morning he "
    "found that the oil was gone. There was no letter from the town, so he went out to look at the "
    "sea instead."
)


FAMILY = "\U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e"  # joiners that spell


# --- Cleaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("a\n\nb", "a\n\nb"),  # trap B11
        ("a\r\nb\rc", "a\nb\nc"),
        ("a \t\n\n\n\n\n  b  ", "a\n\n  b"),
        ("nul\0 bell\a esc\x1b[31m red\x1b[0m", "nul bell esc red"),
        ("N\bNA\bAM\bME\bE", "NAME"),
        ("_\bu_\bn_\bd_\be_\br", "under"),
        ("zero\u200bwidth \u202ebidi\u202c \ufeffbom so\u00adft", "zerowidth bidi bom soft"),
        ("jo\u200din\u200cer", "joiner"),
        (FAMILY, FAMILY),
        ("hid\U000e0041\U000e0042den", "hidden"),
        ("na\u00efve \u00e2\u20ac\u201c x \u00e2\u20ac\u0153y", "na\u00efve \u2013 x \u201cy"),
        ("one\u2028two", "one\ntwo"),
        ("thin\u2009space no\u00a0break", "thin space no break"),
        ("&amp;amp;amp;lt; AT&T", "< AT&T"),
        ("<|im_end|> and </s>", "<|im_end|> and </s>"),  # the tokenizer's affair, not ours
        ("", ""),
        (" \n\t\n", ""),
        ("a \ud800 b", "a \ufffd b"),  # half a surrogate pair
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_clean(dirty, expected):
    assert clean(dirty, CFG) == expected


WRITTEN = [  # as their writers do, and in ASCII
    ("他说\uff1a\u201c你好\uff0c世界\uff01\u201d\uff08测试\uff09……", '他说:"你好,世界!"(测试)……'),
    ("\u201eGuten Tag\u201c, \u201aso\u2018", "\"Guten Tag\", 'so'"),
    ("\u00ab Bonjour \u00bb, l\u2019été", "\u00ab Bonjour \u00bb, l'été"),
    ("\uff21\uff11\uff1c|im_end|\uff1e \uff76\uff9e", "A1<|im_end|> ガ"),
    ("don\u2019t \u2014 \u201cdo\u201d", 'don\'t \u2014 "do"'),
]


@pytest.mark.parametrize(("text", "ascii"), WRITTEN)
def test_punctuation_stays_the_writers_unless_asked(text, ascii):
    mojibake, repaired = "\u00e2\u20ac\u0153x ", "\u201cx "
    assert clean(mojibake + text, CFG) == repaired + text
    assert clean(mojibake + text, replace(CFG, normalize_punctuation=True)) == '"x ' + ascii


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("请访问https://example.com/查看详情。", "请访问查看详情。"),
        ("详情见 https://a.org/b?c=d \uff0c另见www.a.cn\uff1b谢谢", "详情见\uff0c另见\uff1b谢谢"),
        ("说明\uff08https://a.org/x\uff09在此", "说明在此"),
        ("「https://a.jp/」を参照してください。", "を参照してください。"),
        (
            "维基https://zh.wikipedia.org/wiki/中文是一篇文章",
            "维基中文是一篇文章",
        ),  # not the sentence
        ("[文章](https://zh.wikipedia.org/wiki/中文)很好", "文章很好"),
        ("자세한 내용은 https://a.kr/b를 보세요", "자세한 내용은 를 보세요"),
        ("ดูที่https://a.org/xแล้วกลับมา", "ดูที่แล้วกลับมา"),
        ("из http://a.org/Москва, где", "из, где"),
        ("in https://de.wikipedia.org/wiki/Köln steht", "in steht"),
        ("\u00ab http://a.org \u00bb und \u201ehttp://b.org\u201c.", "\u00ab \u00bb und."),
        ("انظر http://a.org/x، ثم عد", "انظر، ثم عد"),
        (
            "使用`pip`安装\uff0c联系我a@b.cn谢谢\uff0c主机10.0.0.1上",
            "使用安装\uff0c联系我[EMAIL]谢谢\uff0c主机[IP]上",
        ),
    ],
)
def test_what_is_taken_out_ends_where_another_script_goes_on(dirty, expected):
    assert clean(dirty, CFG) == expected


@pytest.mark.parametrize(
    ("dirty", "expected"),
    [
        ("See http://a.org/b?c=d#e for more.", "See for more."),
        ("See https://a.org/b.", "See."),
        ("Look (http://a.org/x_(y)) here", "Look here"),
        ("Look (see http://a.org/x), then", "Look (see), then"),
        ("A [link](http://a.org), ![a picture](https://b.org/p.png)!", "A link, a picture!"),
        ("at <https://a.org/>, it", "at, it"),
        ('call it "http://a.org/" now', "call it now"),
        ("www.example.com is down", "is down"),
        ("one\nhttp://a.org/1\nhttp://a.org/2\ntwo", "one\ntwo"),
        ("- http://a.org\n- words\n* [b]: http://b.org", "- words"),
        ('[1]: http://a.org/x "Title"\nwords', "words"),
        ("  indented http://a.org/x\n    more", "  indented\n    more"),
        ("both http://a.org, http://b.org and", "both and"),
        ("ftp://a.org/f and postgresql://user:secret@host/db", "and"),
        ("http:// alone, a://b, www. and 3://4", "http:// alone, a://b, www. and 3://4"),
        ("git+ssh://a.b/c.git, www.a.b/c?d", ""),
    ],
)
def test_web_addresses_go_and_leave_no_hole(dirty, expected):
    assert clean(dirty, CFG) == expected
    assert clean(dirty, replace(CFG, remove_urls=False)) == dirty


FENCED = "Before.\n\n```python\nx = `1`\n```\n\nAfter `it` all."


@pytest.mark.parametrize(
    ("dirty", "remove", "blocks"),
    [
        (FENCED, "Before.\n\nAfter all.", "Before.\n\nAfter `it` all."),
        ("a\n````\n```\nx\n```\n````\nb", "a\nb", "a\nb"),
        ("Heading\n~~~~~~~\n\ntext\n\nOther\n~~~~~\n\ntext", None, None),  # reStructuredText
        (
            "cut = here\n```\nwords\n```sh\nls\n```\nend",
            "cut = here\n```\nwords\nend",
            "cut = here\n```\nwords\nend",
        ),
        ("words\n```\nnever closed", None, None),
        ("`this' and `that', ``so'' and ``on''", None, None),
        ("the ``a.b()`` of `c`, (`d`)", "the of", None),
        ("all `Vec`s of x", "all of x", None),
        ("a ` b ` c", None, None),
        ("- `x`\n- words", "- words", None),
    ],
)
def test_code_goes_as_far_as_asked(dirty, remove, blocks):
    assert clean(dirty, CFG) == (dirty if remove is None else remove)
    assert clean(dirty, replace(CFG, code="blocks")) == (dirty if blocks is None else blocks)
    assert clean(dirty, replace(CFG, code="keep")) == dirty


MASKED = """
write to jane.doe+list@mail.example.co.uk.  ->  write to [EMAIL].
<a_b@c-d.org>, x@y.io  ->  <[EMAIL]>, [EMAIL]
mailto:me@example.com  ->  mailto:[EMAIL]
JANE@EXAMPLE.COM  ->  [EMAIL]
from 192.168.0.1 to 8.8.8.8.  ->  from [IP] to [IP].
10.0.0.1:8080 and 10.0.0.0/8  ->  [IP]:8080 and [IP]/8
10.0.0.1-10.0.0.9  ->  [IP]-[IP]
host=172.16.254.1  ->  host=[IP]
the address is 2001:0db8:85a3:0000:0000:8a2e:0370:7334  ->  the address is [IP]
fe80::1ff:fe23:4567:890a, 2001:db8::1  ->  [IP], [IP]
4111 1111 1111 1111  ->  [CARD]
4111-1111-1111-1111.  ->  [CARD].
5500005555555559  ->  [CARD]
card 378282246310005, 3782 822463 10005  ->  card [CARD], [CARD]
6011000990139424  ->  [CARD]
2223003122003222  ->  [CARD]
4222222222222  ->  [CARD]
+1 (555) 123-4567  ->  [PHONE]
+1-555-123-4567, +15551234567  ->  [PHONE], [PHONE]
+44 20 7946 0958  ->  [PHONE]
+44 (0)20 7946 0958  ->  [PHONE]
+49 30 901820, +49.30.901820  ->  [PHONE], [PHONE]
+33 1 42 68 53 00  ->  [PHONE]
+91 98765 43210  ->  [PHONE]
(555) 123-4567 or 555-123-4567  ->  [PHONE] or [PHONE]
555.123.4567  ->  [PHONE]
123-456-7890  ->  [PHONE]
1-800-555-0199  ->  [PHONE]
020 7946 0958  ->  [PHONE]
07700 900123  ->  [PHONE]
030/12345678, 0171-1234567  ->  [PHONE], [PHONE]
01 42 68 53 00  ->  [PHONE]
0412 345 678  ->  [PHONE]
0044 20 7946 0958  ->  [PHONE]
In 1999 555-123-4567 rang  ->  In 1999 [PHONE] rang
key AKIAIOSFODNN7EXAMPLE  ->  key [KEY]
sk-proj-abcdefghij1234567890ABCDEF  ->  [KEY]
sk-ant-api03-AbCdEfGhIjKlMnOpQrSt_uv  ->  [KEY]
eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN  ->  [KEY]
"""
MASKED = [tuple(line.split("  ->  ")) for line in MASKED.strip().splitlines()]
MASKED += [
    ("token=ghp_" + "aB3d" * 9, "token=[KEY]"),
    ("github_pat_" + "11ABCDEFG0" * 3, "[KEY]"),
    ("xoxb-123456789012-" + "abcdefghijkl", "[KEY]"),
    ("AIza" + "SyD4x_9-8" * 3 + "AbCdEfGh", "[KEY]"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\na=\n-----END RSA PRIVATE KEY-----\nend", "[KEY]\nend"),
    (f"-----BEGIN PRIVATE KEY-----\n{'A' * 64}\n{'B' * 64}\n\nProse.", "[KEY]\n\nProse."),
]
# what only looks private, between bars
STAYS = """
@property and @dataclass | git@github.com:owner/name.git | C = A @ B.T | icon@2x.png
me@localhost, a@b | in version 1.2.3.4 of it | v1.2.3.4, ver. 1.2.3.4, release 10.0.0.1
numpy==1.2.3.4, >= 1.2.3.4, ~=1.2.3.4 | chrome/79.0.3945.88, 300.1.1.1, 1.2.3.4.5
linux-5.10.0.1-amd64 | section 4.1.2.4
kernel 2.6.18.6 | 127.0.0.1 and 0.0.0.0 and 255.255.255.0
at 12:30:45, std::vector, a::b, ::1, :: | x[1000::2] and 00:1A:2B:3C:4D:5E | 4111 1111 1111 1112
1234567890123456 | 0.4111111111111111 | 1690000000000 ms
ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, 9780306406157 | ISSN 0317-8471 | 1999-2004, 1914-1918
2003-01-02, 02/01/2003, 2024-01-15T10:30:00 | 3.14159265358979, +3.14159265 | +1.5 -2.25 +10000000
+1 2 3 4 5 6 7 8 9 | 1,000,000 and 1 000 000 000 | 0000010 0123 4567 0123 4567 | pages 123-1456
12345 or 5551234 | call 100 times | rates of 100 200 3000 | RFC 2822, PEP 484, bug #1234567
123-45-678 | sk-learn and task-oriented-dialogue-of-many-words
sk-estimator-toggleable-label-arrow | ghp_short, AKIA, AIza, eyJhbGci
-----BEGIN CERTIFICATE-----
"""
STAYS = [text for line in STAYS.strip().splitlines() for text in line.split(" | ")]


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_private_data_is_masked(text, expected):
    assert clean(text, CFG) == expected
    assert clean(f"x {text} y", CFG) == f"x {expected} y"
    assert clean(text, replace(CFG, mask_private=False)) == text


@pytest.mark.parametrize("text", STAYS)
def test_what_only_looks_private_stays(text):
    assert clean(text, CFG) == text
    assert clean(f"x {text} y", CFG) == f"x {text} y"


def test_every_line_is_looked_at():
    lines = [text for text, _ in MASKED] + STAYS
    assert clean("\n".join(lines), CFG) == "\n".join([masked for _, masked in MASKED] + STAYS)


def test_a_section_number_is_no_address():
    for heading in (
        "5.14.2.4. Influence of it",
        "  12.3.2.1 Using a File",
        "## 4.1.2.5. constants",
    ):
        assert clean(heading, CFG) == heading
    assert clean("10.0.0.1 - - GET\n200.46.20.71 Host", CFG) == "[IP] - - GET\n[IP] Host"


def test_luhn_is_the_check_of_iso_7812():
    """The standard: double every second digit from the right, add the digits of the products."""
    for number in range(10_000):
        total = 0
        for place, digit in enumerate(reversed(str(number))):
            total += sum(map(int, str(int(digit) * 2))) if place % 2 else int(digit)
        assert luhn(str(number)) == (total % 10 == 0)


# fmt: off
PIECES = [
    "http://a.b/c", "(", ")", "[", "](", " ", "\n", "`", "```", "```py\n", "~~~\n", "a@b.co", "@",
    "x", ".", ",", "- ", "1.2.3.4", "+1 555 123 4567", "4111111111111111", "sk-" + "a1" * 12,
    "&amp;", "amp;", "lt;", "<", "\b", "\x1b[1m", "\u200b", "\u200d", "\u00e2\u20ac\u201c",
    "\u201c",
    "\u00e9", "caf\u00c3\u00a9", "\t", "\r", "\0", "www.", "://", '"', "0", "::", "ab:",
]
MOJIBAKE = [
    "&amp;", "<b>", "\n", "plain", "caf\u00c3\u00a9", "&", "\x1b[1m", "\u2026", "\u201d", "\u2019",
    "\u00e9", "\u00c2 ", "\u0153", "\u20ac", "\u00a0", "\u00ad", "\u200b", "\u2764\ufe0f",
    "\U0001f600", "\u00e0", "\u00c3", "\u00a3", "\u00d7", "\u00b2", "\u0416", "\u0422\u0435",
    "\u03b2", "\u65e5\u672c", "\u2014", " ", "\u00bb", "\u00bd", "A",
]
UNITS = [
    "a", "<", " ", "http", "http://", "1", "1-", "1 ", "1.", "\n", "a@", "@", "a.", "&", "&amp;",
    "amp;", "#38;", "\b", " \n", ".", "\u200b", "= ", "`", "``` ", "```\n", "```x\n", "`a",
    "~~~\n\n", "\\", "(", "[", "[a](", "http://a)(", "-", "-----BEGIN PRIVATE KEY-----",
    "eyJaaaaaaaa.",
    "-eyJaaaaaaaaa", "sk-", "12 ", "1234 ", "1234-", "+1 ", "+", "0123 ", "::", "a:", "tel ",
    "\x1b", "\x1b[", "\x1b]", "\0", "\t", "\u00e9", "\u00c3", "\u00e2\u20ac", "\u65e5", "\u0416",
    "\U0001f600", "\u0301", "\u201c", "http://a.b ", "(http://a.b) ", "`a` ", "- \n", "</a", "#",
]
# fmt: on


def pieced(strings, size):
    return st.lists(st.sampled_from(strings), max_size=size).map("".join)


@given(pieced(PIECES, 14) | st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=500, deadline=None)
@example("[[a](http://b.c)](http://d.e)")
@example("&amp;amp;amp;lt;")
def test_cleaning_twice_is_cleaning_once(text):
    for cfg in (CFG, KEEP, replace(KEEP, normalize_punctuation=True)):
        once = clean(text, cfg)
        assert clean(once, cfg) == once
        assert "\0" not in once


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=200)
    | pieced(MOJIBAKE, 12)
)
@settings(max_examples=500, deadline=None)
def test_the_fast_path_gives_what_ftfy_gives(text):
    assert fix_encoding(text) == ftfy.fix_text(text, **WRITERS)


@pytest.mark.parametrize("unit", UNITS)
def test_a_megabyte_of_anything_passes(unit):
    """Not timed: a quadratic step would take minutes, and the run's time limit is the alarm."""
    cleaned = clean(("&" if ";" in unit else "") + unit * (1_000_000 // len(unit)), CFG)
    reject(cleaned, replace(CFG, max_length=10**7))


# --- Filters --------------------------------------------------------------------------------------


LANGUAGES = {
    "de": "Der alte Mann ging mit dem Hund durch den Wald und kam erst am Abend wieder nach Hause.",
    "fr": "La lampe avait brûlé toute la nuit, et quand le gardien vint il n'y avait plus d'huile.",
    "es": "No había ninguna carta del pueblo, así que salió a mirar el mar en lugar de esperar.",
    "nl": "De lamp had de hele nacht gebrand en toen hij kwam was er geen olie meer in huis.",
    "pl": "Nie było żadnego listu z miasta, więc wyszedł popatrzeć na morze, jak robił co dzień.",
    "ru": "Лампа горела всю ночь, и письма из города не было.",
    "zh": "灯烧了一夜\uff0c早上看守人下楼时油已经没有了。" * 3,
    "sw": "Taa iliwaka usiku kucha, na mlinzi alipokuja aliona kwamba mafuta yamekwisha kabisa.",
}
CODE = """def count(words):
    # How often each word stands in the list, the most frequent one first.
    counts = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
"""


def test_english_is_told_from_other_languages_and_from_nothing():
    assert reject(PROSE, CFG) is None
    assert reject(PROSE.upper(), CFG) is None
    assert reject(CODE, CFG) is None
    for text in LANGUAGES.values():
        assert reject(text, CFG) == "not-english"
        assert reject(text, replace(CFG, language="off")) is None
    assert english_score("") == english_score("1234 5678 !?") == 0.0


@pytest.mark.parametrize("code", ["de", "fr", "ru", "zh"])
def test_py3langid_keeps_the_language_asked_for(code):
    pytest.importorskip("py3langid")
    assert reject(LANGUAGES[code], replace(CFG, language=code)) is None
    assert reject(PROSE, replace(CFG, language=code)) == f"not-{code}"
    with pytest.raises(UserError, match=r"language 'xx': py3langid knows .*, de, .* and off"):
        reject(PROSE, replace(CFG, language="xx"))


def test_mistakes_in_the_settings_are_one_line(monkeypatch):
    with pytest.raises(
        UserError, match=r"quality_off\[1\] must be word-length\|few-words\|.*, got .bullet"
    ):
        configure(CleanConfig, ["--quality_off=symbols,bullet"])
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language_identifier.cache_clear()
    with pytest.raises(UserError, match="pip install py3langid"):
        reject(PROSE, replace(CFG, language="de"))


def test_length_is_counted_in_characters_after_cleaning():
    assert reject("x" * 49, CFG) == "too-short"
    assert reject(PROSE, replace(CFG, min_length=len(PROSE))) is None
    assert reject(PROSE, replace(CFG, max_length=len(PROSE))) is None
    assert reject(PROSE, replace(CFG, max_length=len(PROSE) - 1)) == "too-long"


GOOD = {
    "de": "Die Donaudampfschifffahrtsgesellschaft eröffnete im Frühjahr eine Nebenstrecke, deren "
    "Fahrpläne die Gemeindeverwaltungen mitgestalteten. Naturschutzverbände begrüßten, dass die "
    "Uferbefestigungen erhalten blieben, und die Wochenmärkte bekamen neue Kundschaft.",
    "ru": "Утром рыбаки вытащили лодку на песок и долго спорили, откуда дует ветер. Старший из них "
    "говорил, что к вечеру непременно пойдёт дождь, младший же смеялся и чинил сети возле дома.",
    "ar": "خرج المعلم من المدرسة بعد الظهر وجلس تحت شجرة الزيتون يقرأ رسالة قديمة من أخيه، ثم كتب "
    "له جوابا طويلا عن الحصاد والمطر وعن الجيران الذين رحلوا إلى المدينة في الشتاء الماضي.",
    "hi": "सुबह होते ही किसान अपने खेत की ओर चल पड़ा और रास्ते में उसने नदी के किनारे बैठे बच्चों को देखा। "
    "वे मिट्टी के छोटे घर बना रहे थे और आपस में हँस रहे थे। शाम को सबने मिलकर खाना खाया।",
    "th": "ตอนเช้าชาวนาเดินไปที่ทุ่งนาพร้อมกับสุนัขตัวเก่า เขาหยุดพักใต้ต้นมะม่วงแล้วมองดูเมฆที่ลอยมาจากภูเขา "
    "เมื่อฝนตกในตอนบ่ายเด็กๆวิ่งออกมาเล่นน้ำหน้าบ้านอย่างสนุกสนาน",
    "zh": "清晨\uff0c渔夫把小船推下水\uff0c妻子在岸边补网……儿子昨天从城里回来了\uff0c"
    "带来新米和几本旧书。到了傍晚……一家人坐在院子里吃饭\uff0c听老人讲从前的故事\uff0c谁也没有注意到天黑。",
    "ja": "朝早く、漁師は小さな船を海に出し、妻は岸で網を直していました。昨日町から帰った息子は、"
    "新しい米と古い本を何冊か持ってきて、夕方になると家族みんなで庭に座って話をしました。",
}


@pytest.mark.parametrize("code", GOOD)
def test_good_text_of_any_language_is_kept(code):
    pytest.importorskip("py3langid")
    for copies in (1, 12):  # a story of many paragraphs, each with words of its own
        text = "\n\n".join(f"{n}. {GOOD[code]}" for n in range(copies))
        off = ("repeated-phrases",) if copies > 1 else ()
        cfg = replace(CFG, language=code, quality_off=off)
        assert reject(clean(text, cfg), cfg) is None
        assert clean(text, cfg) == text


WORDS = PROSE.split()
JUNK = {
    "word-length": "a b c d e f " * 60,
    "few-words": " ".join(f"{n} {n * n} total" for n in range(100, 200)),
    "symbols": " ".join(f"{word} ..." if n % 5 == 0 else word for n, word in enumerate(WORDS * 3)),
    "bullets": "\n".join(f"- item {n} of the list here" for n in range(20)),
    "ellipses": "\n".join(
        f"{' '.join(WORDS[n : n + 16])}{'...' if n % 3 else ''}" for n in range(20)
    ),
    "repeated-lines": "\n".join(WORDS[n % 7] + " and the rest of the line" for n in range(30)),
    "repeated-phrases": " ".join(WORDS[:30] * 3),
    "markup": f"<div><p>{PROSE}</p><ul><li>one</li><li>two</li></ul></div>",
}


@pytest.mark.parametrize("rule", QUALITY)
def test_each_rule_of_quality_acts_and_can_be_switched_off(rule):
    everything = replace(CFG, language="off")
    assert reject(JUNK[rule], everything) is not None
    others = tuple(name for name in QUALITY if name != rule)
    assert reject(JUNK[rule], replace(everything, quality_off=others)) == rule
    assert reject(JUNK[rule], replace(everything, quality_off=tuple(QUALITY))) is None
    assert reject(JUNK[rule], replace(everything, quality=False)) is None
    assert reject(PROSE, replace(CFG, quality_off=others)) is None


# --- Real text ------------------------------------------------------------------------------------


def shared(path):
    """A file of the shared data, if it is there."""
    if not (SHARED / path).exists():
        pytest.skip("needs the shared data")
    return SHARED / path


def rows(path):
    return [json.loads(line) for line in shared(path).read_text(encoding="utf-8").splitlines()]


def test_labelled_texts_are_told_apart_by_their_language():
    texts = [row for row in rows("langid/dev.jsonl") if row["is_english"] is not None]
    kept = [english_score(row["text"]) >= 0.7 for row in texts]
    for english, share in ((True, 0.97), (False, 0.03)):
        found = [
            keep for keep, row in zip(kept, texts, strict=True) if row["is_english"] is english
        ]
        assert (sum(found) / len(found) >= share) is english


def test_ftfys_own_cases_come_out_as_ftfy_has_them():
    cases = json.loads(shared("dirty/ftfy_cases.json").read_text(encoding="utf-8"))
    for case in cases:
        fixed = ftfy.fix_text(case["original"])
        assert fix_encoding(case["original"]) == ftfy.fix_text(case["original"], **WRITERS)
        invisible = str.maketrans(
            dict.fromkeys("\x81\u200b\xad", "") | {"\xa0": " ", "\u2800": " "}
        )
        cleaned = clean(case["original"], replace(KEEP, normalize_punctuation=True))
        assert cleaned == fixed.translate(invisible).rstrip()
        if case["expect"] == "pass":
            assert fixed == case["fixed"]


def pieces(name, size=9000):
    """A dirty file in documents of at most `size` characters, as bytes of UTF-8 that may not be."""
    text = shared(f"dirty/files/{name}").read_bytes().decode("utf-8", "surrogateescape")
    return [clean(text[at : at + size], CFG) for at in range(0, max(1, len(text)), size)]


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("html_secA2.html", {"markup"}),
        ("html_sql-select.html", {"markup", "word-length"}),
        ("hex_dump.txt", {"word-length"}),
        ("urls_only.txt", {"too-short"}),
        ("pathological_regex.txt", {"word-length", "too-short"}),
        ("udhr_French_Francais-Latin1.txt", {"not-english"}),
        ("udhr_Korean_Hankuko-UTF8.txt", {"not-english"}),
        ("udhr_English-Latin1.txt", {None}),
        ("overstrike_man.txt", {None}),
        ("ansi_escapes.txt", {None}),
        ("zero_width_bidi.txt", {None}),
    ],
)
def test_dirty_files_end_as_their_manifest_says(name, reasons):
    assert {reject(text, CFG) for text in pieces(name) if text} <= reasons | {"too-short"}
    assert reasons == {None} or None not in {reject(text, CFG) for text in pieces(name)}
