"""Find the answer, or the content of a tag, inside a longer text.

Every function reads the text once, for any text.
"""

import re
from collections.abc import Sequence

from textpolicy.rewards.verifiers.mathematics.units import UNIT_WORDS

_NUMBER = re.compile(r"(?<![0-9A-Za-z)\]}])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")
_ANSWER = re.compile(
    r"\b(?:answer|(?:correct|right|best) (?:option|choice))\b[*:\s]{0,4}"
    r"(?:is|=|:|equals)[*:\s]{0,4}"
    r"(?:(?:actually|therefore|thus|simply|exactly|option|choice)\b[*:\s]{0,4})?",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"\n|[.!?](?:\s|$)|[,;]?\s+(?:because|since|but|which|where|when|if|as|so|not|with)\b|\*\*"
)
_MATHS = re.compile(
    r"\$([^$]+)\$|\\\(((?:(?!\\[()]).)+)\\\)|\\\[((?:(?!\\[\[\]]).)+)\\\]", re.DOTALL
)
# A number with up to four words of a unit behind it: 12 square meters, 2 hours 30 minutes.
_MEASURE = re.compile(
    r"[-+]?(?:\\?\$|[\u20ac\u00a3])?[0-9][0-9.,/:]*(?:\s*[^\W\d_]+(?:[./^][a-z0-9]+)?\.?){1,4}"
    r"(?:\s[0-9.]+(?:\s[^\W\d_]+){1,2})?"
)
_UNIT = re.compile(r"\s?([^\W\d_]+(?:/[a-z]+)?)(?:\s([^\W\d_]+))?(?:\s([^\W\d_]+))?")
_MAX_SEARCHED = 10_000
_MAX_CLAUSE = 256
_MAX_SHORT_LINE = 64


def final_answer(
    text: str, *, tags: Sequence[str] = ("answer",), number: bool = True
) -> str | None:
    """Return the answer that a text gives, or None if there is none.

    The answer is the first of these that the text has: the last \\boxed{}, the last complete pair
    of one of `tags`, the line after the last "####", what follows the last "the answer is", the
    whole text if it is one short line without prose, the last mathematics between dollar signs if
    no number follows, the last number with its unit. The last four count only with `number`.
    """
    if "\\boxed" in text or "\\fbox" in text:
        return last_boxed(text)
    for tag in tags:
        if (inside := tagged(text, tag)) is not None:
            return inside
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if not number:
        return None
    text = text[-_MAX_SEARCHED:]
    if (clause := _clause(text)) is not None:
        return clause
    line = text.strip()
    if line and len(line) <= _MAX_SHORT_LINE and "\n" not in line and not _is_prose(line):
        return line
    return _last_maths(text)


def _clause(text: str) -> str | None:
    """Return what follows the last "the answer is", up to the end of the clause."""
    start = None
    for match in _ANSWER.finditer(text):
        start = match.end()
    if start is None:
        return None
    rest = text[start : start + _MAX_CLAUSE]
    if match := _MATHS.match(rest):
        return next(group for group in match.groups() if group).strip()
    end = _CLAUSE_END.search(rest)
    return rest[: end.start() if end else None].strip() or None


def _last_maths(text: str) -> str | None:
    """Return the last mathematics between dollar signs, or the number behind it with its unit."""
    numbers = list(_NUMBER.finditer(text))
    last = numbers[-1] if numbers else None
    for match in reversed(list(_MATHS.finditer(text))):
        inside = next(group for group in match.groups() if group).strip()
        if last is not None and last.start() >= match.end():
            break
        if len(inside) <= _MAX_CLAUSE and not re.search(r"(?<!\\)\b[a-z]{4,}\s", inside):
            return inside
        break
    return _with_unit(text, last) if last is not None else None


def _with_unit(text: str, number: re.Match[str]) -> str:
    """Return the number with its currency and the words behind it, if they are a known unit."""
    digits = number[0].rstrip(",")
    before = text[number.start() - 1 : number.start()]
    if before in ("$", "\u20ac", "\u00a3"):
        return f"{before}{digits}"
    match = _UNIT.match(text, number.end())
    words = [word for word in match.groups() if word] if match else []
    for count in range(len(words), 0, -1):
        if UNIT_WORDS.issuperset(word for word in words[:count] if word != "per"):
            return f"{digits} {' '.join(words[:count])}"
    return digits


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{} or \\fbox{}, or None without a complete one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    opening = text.find("{", start)
    if start < 0 or opening < 0 or text[start:opening].strip() not in ("\\boxed", "\\fbox"):
        return None
    depth = 0
    for place in range(opening, min(len(text), opening + _MAX_SEARCHED)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening + 1 : place].strip()
    return None


def last_number(text: str) -> str | None:
    """Return the last number of a text as it is written: 1,234.5 or 3/4 or -20%."""
    numbers = [match[0] for match in _NUMBER.finditer(text[-_MAX_SEARCHED:])]
    return numbers[-1].rstrip(",") if numbers else None


def has_layout(
    text: str, tags: Sequence[str] = ("think", "answer"), *, in_thought: bool = False
) -> bool:
    """Return whether the text is only these tags, each opened and closed once, in this order.

    With `in_thought`, the prompt has opened the first tag, and the text begins inside it.
    """
    rest = _with_opened(text, tags, in_thought).strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if not rest.startswith(opening) or rest.count(opening) != 1 or rest.count(closing) != 1:
            return False
        inside, _, rest = rest.removeprefix(opening).partition(closing)
        if any(f"<{other}>" in inside or f"</{other}>" in inside for other in tags):
            return False
        rest = rest.strip()
    return not rest


def tag_share(
    text: str, tags: Sequence[str] = ("think", "answer"), *, in_thought: bool = False
) -> float:
    """Return the share of opening and closing tags that occur exactly once in the text.

    With `in_thought`, the prompt has opened the first tag, and the text begins inside it.
    """
    text = _with_opened(text, tags, in_thought)
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def _with_opened(text: str, tags: Sequence[str], in_thought: bool) -> str:
    return f"<{tags[0]}>{text}" if in_thought and tags else text


def tagged(text: str, tag: str) -> str | None:
    """Return the content of the last complete <tag>...</tag>, or None if there is none."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end].strip() if start >= 0 else None


def _is_prose(line: str) -> bool:
    """Return whether the line has words beside a number, or two words in a row."""
    if _MEASURE.fullmatch(line.rstrip(".")):
        return False
    outside = _MATHS.sub(" ", line)
    if "\\" in outside:
        return False
    if outside != line:
        return re.search(r"\b(?!(?:and|or)\b)[^\W\d_]{2,}", outside) is not None
    beside_number = re.search(r"[0-9]", line) and re.search(r"[^\W\d_]{4,}(?:[\s,.;:]|$)", line)
    return bool(beside_number or re.search(r"[^\W\d_]{2,}[\s,]+[^\W\d_]{2,}", line))
