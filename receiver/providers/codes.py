"""The codes of errors: a table of the words that providers, and the models behind them, use.

Most of the words are not the provider's own: it runs other makers' models and passes on their
errors. So this table covers the words of a dozen makers, for every channel. A text is first
normalized (see `plain`), so that `OutputImageSensitiveContentDetected`, `IMAGE_SAFETY` and "Content
moderated" become plain words, and every row is written for that form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Final

from receiver.model.values import ErrorCode

_HUMP: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD_OR_END: Final = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[.;!?](?=\s|$)")


def plain(text: str) -> str:
    """Return a text as lower-case words separated by one blank, with `.` for a sentence's end."""
    straight = text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("n't", " not")
    words = _WORD_OR_END.findall(_HUMP.sub(" ", straight).lower())
    return " ".join("." if word in ".;!?" else word for word in words)


# A row is a regular expression over whole words, in which `{law}` stands for any word of that kind
# below, and `~5` for up to five words of one sentence.
_KINDS: Final = {
    "thing": "(?:prompt|input|output|image|picture|photo|frame|video|audio|text|content|material|"
    "media|request|generation|result|file|word|caption|message)s?",
    "was": "(?: (?:was|were|is|are|has been|have been|got))?",
    "law": "(?:polic(?:y|ies)|guidelines?|terms|standards|rules|practices|laws?|copyrights?)",
    "stopped": r"(?:block|reject|refus|filter|flag|restrict|prohibit|den[iy]|declin|remov|stopp|"
    r"disallow|forbid|intercept|trigger|detect|caught|fail)\w*\b(?! to\b)",
    "judge": r"(?<!enable )(?:moderat(?:ion|ors?)|safety(?! (?:tolerance|level|settings?))|"
    r"guardrails?|(?:nsfw|content) (?:filters?|check(?:ers?|s)?|review|polic\w+|inspection)|"
    r"risk control|censor\w*)\b",
    # A checker that was not available has refused nothing.
    "at_work": r"(?!~3 (?:unavailable|offline|down|busy|overloaded|unreachable|timed? ?out)\b)",
    "bad": r"(?<!case )\b"
    r"(?!\w+ (?:char(?:acter)?s?|urls?|paths?|methods?|ports?|values?|dimensions?)\b(?! are\b))"
    r"(?:nsfw|sexual\w*|porn\w*|nud(?:e|ity)|violen(?:t|ce)|gor[ey]|hate speech|hateful|abusive|"
    r"offensive|obscene|indecent|inappropriate|unsafe|harmful|self harm|explicit|sensitive|"
    r"prohibited|disallowed|banned|minors|celebrit(?:y|ies)|public figures?|real people|"
    r"copyright\w*|trademark\w*|intellectual property)\b",
    # If a reason or condition follows, that one must be about content.
    "full_stop": r"(?! (?:with|together|when|if|in|for|at|on|unless|by|as|due|because|until)\b)",
    # A policy, limit or filter with one of these names is not about content.
    "technical": "(?:access|account|api|bucket|billing|cache|caching|concurrency|constraint|cors|"
    "fair|firewall|iam|key|lifecycle|limits?|network|org|organization|permission|quota|rate|"
    "resource|retention|retry|schema|security|spending|storage|validation)",
}

_CONTENT: Final = (
    # A rule about content: its name, or its violation.
    r"content (?:management )?(?:polic(?:y|ies)|guidelines?|violations?|risk)\b{at_work}",
    r"content (?:restrict(?:ed|ions?)|filter(?:s|ed|ing)?)\b{at_work}",
    r"(?:community|safety|moderation) (?:policy|policies|guidelines?|standards)",
    r"responsible ai|rai (?:media )?filtered",
    r"(?:violat|infring|breach)\w*~8 {law}",
    r"{thing}~2 violations?|(?:copyright|ip|safety) (?:violation|infring)\w*",
    r"(?:against|prohibited by|comply with|adhere to|conform to)~4 {law}",
    r"(?:not (?:allowed|permitted)|{stopped}) (?:by|due to|under)~4 {law}",
    # A content checker, with its verdict before or after it.
    r"{stopped}~6 {judge}{at_work}",
    r"(?:not|never|fail\w* to)(?: be)? pass\w*~5 (?:{judge}|review|inspection|audit)",
    r"{judge}{at_work}~3 (?:{stopped}|not passed|violat\w*|error)",
    r"(?:safety|moderation) (?:system|filters?|reasons?|concerns?|blocks?)\b(?! level){at_work}",
    r"{thing}{was} moderated|content moderation\b{at_work}|guardrails?\b{at_work}",
    # A thing, and its verdict.
    r"{thing}{was} flagged\b(?! (?:as|for)\b)",
    r"flagged~5 (?:{bad}|{judge}|violating)",
    r"{thing}{was} not (?:allowed|permitted)\b{full_stop}",
    r"(?:prompt|image|video|content|text|output|generation)s?{was} blocked\b{full_stop}",
    r"(?:images?|videos?|outputs?|results?){was} filtered",
    # Content that makers refuse.
    r"{bad}(?: or [^ .]+)? (?:contents?(?! type)|images?|imagery|material|information|media)",
    r"{bad}(?: or [^ .]+)? (?:words?|terms?|prompts?|keywords?|topics?|subjects?)",
    r"(?:contain|depict|includ|deem|consider|classif|involv|show|detect)\w*~5 {bad}",
    r"(?:(?<!not )found|as|too|be|potentially)~5 {bad}",
    r"{bad}~3 (?:detected|found|flagged|(?:block|reject|refus|prohibit|restrict)\w*)",
    r"{bad}~3 not (?:allowed|permitted|supported)",
    r"{stopped}~3 {bad}",
    r"public figures?|celebrit(?:y|ies)|likeness(?:es)?|real people|not safe for work",
    r"sexual(?:ly|ity|ized)?|csam|illegal content",
    # Codes of single makers: Google, Runway, ByteDance, Alibaba, MiniMax, Kling.
    r"(?:image|output) safety\b(?! (?:tolerance|checker|level))|recitation",
    r"finish reason(?: is| was)? (?:safety|blocklist|spii)|person generation is not allowed",
    r"preprocessing safety|safety (?:input|output)",
    r"(?:input|output) (?:text|image|video|audio) (?:risk|sensitive)|risk (?:control|detection)",
    r"data inspection failed|ip infringement|(?:new|input|output) sensitive",
    r"[^ ]*(?:敏感|违规|不合规|不符合规范|审核[未不]通过|未通过审核|安全审核)[^ ]*",
)

# Errors of parameter validation, which may mention `moderation` or `safety_tolerance`.
_VALIDATION: Final = (
    r"(?:field|property|parameter|argument) (?:is )?required|required (?:field|property)",
    r"(?:input|value) should|ensure this value",
    r"(?:must|should) be (?:one of|less|greater|at (?:least|most)|between|an?|either|in)",
    r"(?:must|should) be (?:set|true|false|equal)",
    r"(?:extra|unknown) (?:inputs?|fields?|param\w*|arguments?)|unexpected (?:keyword|argument)",
    r"not (?:an? )?(?:valid|recognized|known) (?:value|option|enum|choice|parameter|field)",
)
_VALIDATION_TYPES: Final = (
    r"missing|one of|multiple of|extra forbidden|literal error|enum|type error",
    r"(?:less|greater) than|(?:string|sequence|image|file|video|audio) too \w+",
    r"(?:int|float|bool|string|list|dict|url|json) (?:type|parsing|invalid)",
)
_CONTENT_TYPES: Final = (
    r"(?:moderat\w+|safety|nsfw|sensitive|prohibited|recitation|blocklist)\b{at_work}",
)
_TIMEOUT: Final = (r"\w*timed? ?out\w*|deadline exceeded|took too long",)


def _within(most: int) -> str:
    return rf"(?: (?!{_KINDS['technical']}\b)[^ .]+){{0,{most}}}"


@cache
def _pattern(rows: tuple[str, ...]) -> re.Pattern[str]:
    """Return one regular expression for rows, with their placeholders replaced.

    It is compiled on first use: compiling all takes as long as importing all providers.
    """
    text = "|".join(rows)
    for kind, words in _KINDS.items():
        text = text.replace(f"{{{kind}}}", words)
    text = re.sub(r"~(\d)", lambda number: _within(int(number[1])), text)
    return re.compile(rf"\b(?:{text})\b")


Rows = tuple[tuple[tuple[str, ...], ErrorCode], ...]

# The first row that matches gives the code. Hints for machines (an error's type or category) are
# short and precise: they are tried before the message, and single words of them are enough.
_BY_HINT: Final[Rows] = (
    ((*_CONTENT_TYPES, *_CONTENT), "content_policy"),
    (_TIMEOUT, "timeout"),
    (_VALIDATION_TYPES, "provider_error"),
)
_BY_WORDS: Final[Rows] = (
    (_VALIDATION, "provider_error"),
    (_CONTENT, "content_policy"),
    (_TIMEOUT, "timeout"),
)


def code_of(message: str, hints: Iterable[str]) -> ErrorCode:
    """Return the code of an error from its texts; the caller must bound their length."""
    tries = ((_BY_HINT, "; ".join(hints)), (_BY_WORDS, message))
    found = (_first(rows, plain(text)) for rows, text in tries)
    return next((code for code in found if code), "provider_error")


def _first(rows: Rows, text: str) -> ErrorCode | None:
    return next((code for words, code in rows if _pattern(words).search(text)), None)
