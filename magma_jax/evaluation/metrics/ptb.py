"""Penn Treebank tokenisation of captions, as the coco protocol has it done by Stanford's tokenizer.

Captions are scored on these tokens, so the scores of the literature depend on what that program does: it splits
``isn't`` into ``is n't``, keeps ``p.m.`` whole, writes ``(`` as ``-lrb-``, leaves ``dog.A`` alone. Its behaviour is
restated here as one regular expression, from observation of version 3.4.1 with ``-preserveLines -lowerCase``.
"""

import re

# Abbreviations that keep their period wherever they stand; single letters and ``p.m.`` do so by their form.
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|drs|prof|profs|sen|sens|rep|reps|atty|attys|lt|col|gen|messrs|gov|"
    "govs|adm|rev|maj|sgt|cpl|pvt|mt|capt|st|ste|ave|pres|lieut|rt|hon|brig|co|corp|"
    "cos|bros|ltd|plc|inc|jr|sr|esq|ph|md|etc|al|seq|vs|bldg|cf|mfg|jan|feb|mar|"
    "apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|ala|ariz|"
    "calif|colo|conn|ct|dak|fla|ga|ind|kans|kan|ky|mich|minn|mo|mont|nev|neb|okla|"
    "penn|tenn|va|vt|wis|wisc|wyo|tel|est|ext|sq|dept|ft|rd|blvd|sys|natl|intl|assn|"
    "univ|jos|wm|alex|supt|asst|cmdr|comdr|det|insp|mme|mlle"
)
# These are also words, and count as abbreviations when capitalised ...
_ABBREVIATIONS_CAPITALISED = "Miss|MISS|Ark|ARK|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH"
# ... and these before a number.
_ABBREVIATIONS_NUMBERED = "nos?|pp|figs?|art|prop|op|ca"

# Letters; a word, which may hold a full stop, question or exclamation mark before a further letter; several of them
# joined by hyphens or underscores; and the end of a word.
_LETTER = r"[^\W\d_]"
_WORD = rf"{_LETTER}[^\W_]*(?:[.!?]{_LETTER}[^\W_]*)*"
_COMPOUND = rf"(?:{_WORD}|[^\W_]+)(?:[-_](?:{_WORD}|[^\W_]+))+"
_END = r"(?![^\W_])"
_SLASHED = r"[a-zA-Z0-9]+(?:-[a-zA-Z]+){0,2}"

# In order of precedence: the first that matches at a position is the token.
_ALTERNATIVES = (
    # Addresses, tags and smileys.
    r"https?://[^\s\"<>|()]+",
    r"(?:www\.)?(?:[a-zA-Z0-9_-]+\.)+(?:com|net|org|edu)\b(?:/[^\s\"<>|()]*)?",
    r"[a-zA-Z0-9][\w.+-]*@(?:[\w-]+\.)+[\w-]+",
    r"</?[a-zA-Z][^<>]*>",
    r"[a-zA-Z]+@\w+|[@#][a-zA-Z_]\w*",
    r"(?i:-[lr][rcs]b-)",
    rf"[<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]]{_END}",
    # Contractions. Of those without an apostrophe only the first half is taken; the second is then a word.
    rf"(?i:can(?=not{_END})|gon(?=na{_END})|got(?=ta{_END})|lem(?=me{_END})|gim(?=me{_END})|wan(?=na{_END}))",
    rf"(?i:'t(?=(?:is|was){_END})|y'(?=all{_END}))",
    rf"(?i:'(?:cause|em|til){_END}|'n'|'n{_END})",
    rf"(?i:(?<!\w)'(?:[2-9]0s|\d\d){_END})",
    rf"(?i:'(?:s|m|d|re|ve|ll){_END}|n't{_END}|{_LETTER}+?(?=n't{_END}))",
    # Words that an apostrophe does not split.
    rf"(?i:ma'am|c'mon|n?e'er|s'mores|li'l|hawai'i|ol'){_END}",
    rf"(?:[dDoOlL]|[A-HJ-XZ])'{_LETTER}{{2,}}",
    # Dates and fractions; a whole number before a fraction belongs to it.
    r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}(?!\d)",
    r"\d{1,4}[- \u00a0]\d{1,4}/\d{1,4}(?![\w/])",
    # Abbreviations and acronyms keep their periods; so does a single letter, unless a new sentence plainly follows.
    rf"(?i:{_ABBREVIATIONS})\.{_END}",
    rf"(?:{_ABBREVIATIONS_CAPITALISED})\.{_END}",
    rf"(?i:{_ABBREVIATIONS_NUMBERED})\.(?=\s?\d)",
    rf"(?:[a-zA-Z]\.)+[a-zA-Z]\.(?:-[^\W_]+|{_END})|(?i:ph\.d\.)",
    rf"[a-zA-Z]\.{_END}(?!\s+(?:A|An|The|There|It|This)\b)",
    # Words joined by slashes, at most three; by hyphens; capitals joined by an ampersand.
    rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
    r"[cC]\+\+",
    _COMPOUND,
    r"[A-Z]+(?:[&+][A-Z]+)+",
    # Numbers, currencies, words.
    r"[-+]?\d*(?:[.,:]\d+)+",
    rf"\d+{_LETTER}[^\W_]*",
    r"[-+]?\d+",
    r"[A-Z]*\$",
    _WORD,
    # Runs of punctuation that form one token, then whatever is left.
    r"\.{3,5}|-+|[?!]+|\*+|_+|``|''",
    r"\S",
)
_TOKEN = re.compile("|".join(_ALTERNATIVES))

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_CHARACTERS = str.maketrans(
    # Quotation marks, dashes, ellipsis.
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--", "\u2026": "..."}
    # The treebank knows dollars, cents and "#"; it spells fractions.
    | {"\u20ac": "$", "\u00a3": "#", "\u00a2": " cents ", "\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4"}
    # Soft hyphen, zero-width space.
    | {"\u00ad": None, "\u200b": " "}
)
# The program deletes what needs two UTF-16 units: emoji, mostly.
_OUTSIDE_BMP = re.compile("[\U00010000-\U0010ffff]")

# What the protocol drops. Its list has the brackets in upper case, so the lower-cased ones stay.
_DROPPED = frozenset([*"'\"`.?!,:;-", "''", "``", "...", "....", ".....", "--", "---", "----"])


def ptb_tokenize(caption: str) -> str:
    """The tokens of ``caption``, lower-cased, without punctuation, joined by single spaces.

    A mixed number is one token with a no-break space (``22\\u00a03/4``), which ``str.split`` divides again.
    """
    for entity, character in _ENTITIES.items():
        caption = caption.replace(entity, character)
    caption = _OUTSIDE_BMP.sub(" ", caption.translate(_CHARACTERS))
    tokens = (_written(token) for token in _TOKEN.findall(caption))
    return " ".join(token for token in tokens if token not in _DROPPED)


def _written(token: str) -> str:
    # Up to three characters: brackets and smileys, not the brackets within an address.
    if len(token) <= 3:
        token = "".join(_BRACKETS.get(character, character) for character in token)
    return token.replace(" ", "\u00a0").lower()  # a space is left only before a fraction and in <a tag>
