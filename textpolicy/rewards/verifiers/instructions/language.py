"""Which language a text is in: by its script, and by frequent words or letters within a script.

This covers the languages of the public instructions. It is small and has no model, so a text of a
few words, or in a language that is not listed, may be undecided.
"""

# ruff: noqa: RUF001  Letters of other scripts that look like Latin ones are meant.

import unicodedata
from collections import Counter

_LONGEST = 20_000
# Scripts that decide the language, by the first word of the Unicode names of their letters.
_SCRIPTS = {
    "BENGALI": "bn",
    "GUJARATI": "gu",
    "GURMUKHI": "pa",
    "HANGUL": "ko",
    "HEBREW": "he",
    "KANNADA": "kn",
    "MALAYALAM": "ml",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "GREEK": "el",
}
_WORDS = {
    "LATIN": {
        "en": "the and of to a in is that it for you was with on are this be as not have i my your",
        "de": "der die und das ist nicht ein eine ich zu mit auf für den von im sie es auch sich",
        "es": "el la de que y los en se del las por un para con no una su al lo es como más pero",
        "fr": "le la les et des est une un du que dans pour qui sur pas ce il je vous nous avec au",
        "it": "il di che la e un per è non una sono con del si lo da gli della le come anche ma",
        "pt": "o de que e do da em um para com não uma os no se na por mais as dos como mas ao é",
        "pl": "i w na nie się z do to że jest o jak za od po ale czy przez dla są był tym jego co",
        "vi": "và của là có không được cho một những người trong với các này đã khi để tôi đến từ",
        "fi": "ja on ei se että oli hän mutta ovat kun niin myös tai joka sen minä olen kuin ole",
        "sw": "na ya wa ni kwa katika za la kuwa hii cha yake kama hiyo si ambayo sana pia watu",
    },
    "CYRILLIC": {
        "ru": "и в не на что с как это по но он она они был для все так его из у мы вы или",
        "uk": "і в не на що з як це по але він вона вони був для все так його та у ми ви або є",
        "bg": "и в не на че с как това по но той тя те беше за всички така от са се да ще или е",
    },
    "DEVANAGARI": {
        "hi": "है और के का की में से को नहीं यह हैं पर था कि एक भी लिए ने हो जो",
        "mr": "आहे आणि च्या ची चे मध्ये नाही हा ही हे आहेत वर होता की एक ते त्या ला होती मी",
        "ne": "छ र को मा का लाई छन् यो हो थियो पनि एक गर्न भएको छैन तर हुन्छ म ले हामी",
    },
    "ARABIC": {
        "ar": "في من على أن إلى هذا التي عن مع لا ما هو كان هذه الذي أو كل بعد قد هي",
        "fa": "است و در به از که این را با برای آن می یک بود شود ها هم تا خود نیست",
        "ur": "ہے اور کے کی میں سے کو نہیں یہ ہیں پر تھا کہ ایک بھی لیے نے ہو جو کا",
    },
}
# Letters of one of the languages above that the others of its script do not have.
_LETTERS = {
    "de": "ß",
    "es": "ñ¿¡",
    "pt": "ãõ",
    "pl": "łąęśżźćń",
    "vi": "ơưđăạảấầậắằốồộớờợếềệ",
    "ru": "ыэё",
    "uk": "іїєґ",
    "mr": "ळ",
    "ar": "يكةأإ",
    "fa": "ژ",
    "ur": "ٹڈڑںےھہ",
}
_LISTED = {
    script: {code: frozenset(words.split()) for code, words in languages.items()}
    for script, languages in _WORDS.items()
}
KNOWN = frozenset({"ja", "zh", *_SCRIPTS.values(), *(c for some in _WORDS.values() for c in some)})
"""Codes of the languages that can be found."""


def language_of(text: str) -> str | None:
    """Return the code of the language of a text, such as "en", or None if it is undecided."""
    text = unicodedata.normalize("NFC", text[:_LONGEST]).lower()
    scripts = Counter(script for char in text if char.isalpha() and (script := _script_of(char)))
    if not scripts:
        return None
    # Japanese texts have Chinese characters as well, and these alone are Chinese.
    if kana := scripts["HIRAGANA"] + scripts["KATAKANA"]:
        scripts["HIRAGANA"] = kana + scripts["CJK"]
        del scripts["CJK"]
    script, _ = scripts.most_common(1)[0]
    own = {"HIRAGANA": "ja", "CJK": "zh", **_SCRIPTS}
    return own.get(script) or _by_words(text, script)


def _script_of(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0]


def _by_words(text: str, script: str) -> str | None:
    languages = _LISTED.get(script)
    if languages is None:
        return None
    # Marks of vowels are no letters, and belong to words.
    words = "".join(
        char if char.isalpha() or unicodedata.category(char).startswith("M") else " "
        for char in text
    ).split()
    counts = Counter(words)
    letters = Counter(text)
    found = {
        code: sum(counts[word] for word in known)
        + sum(letters[letter] for letter in _LETTERS.get(code, ""))
        for code, known in languages.items()
    }
    best, *others = sorted(found, key=found.__getitem__, reverse=True)
    is_clear = found[best] > 0 and found[best] > found[others[0]]
    return best if is_clear else None
