"""Penn Treebank tokenisation of captions, as done by Stanford's tokenizer in the coco protocol.

Captions are scored on these tokens, so published scores depend on that program's behaviour: it splits ``isn't`` into
``is n't``, keeps ``p.m.`` whole, writes ``(`` as ``-lrb-``, leaves ``dog.A`` alone. It is reimplemented here from
observation of version 3.4.1 with ``-preserveLines -lowerCase``; ``ptb_rules`` has the rules.

Known differences: if a caption ends in a single letter or ``no.`` with a period, the program looks at the next caption
of its file; it splits captions at U+2028, U+0085 and form feeds; some letters of scripts other than Latin, Greek and
Cyrillic; soft hyphens within file names.
"""

import re

from magma_jax.evaluation.metrics.ptb_rules import PLAIN, RULES, SMILEY

_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Tokens that are rewritten. The treebank has dollars, cents and "#", and spells out fractions.
_WRITTEN = {
    **_BRACKETS,
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    **{"\u00a3": "#", "\u00a2": "cents", "\u2026": "..."},
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **dict.fromkeys(["\u0096", "\u0097", "\u2013", "\u2014", "\u2015", "&MD;", "&mdash;", "&ndash;"], "--"),
    **{"&lt;": "<", "&gt;": ">"},
}
# Quotation marks, for tokens that consist of them: opening and closing ones differ.
_QUOTES = str.maketrans(
    dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb", "''")
)
_ONLY_QUOTES = re.compile("['`\u0091-\u0094\u2018\u2019\u201b-\u201d\u2039\u203a\u00ab\u00bb]+")
_CONTRACTION = re.compile("(?i)['\u0092\u2019](?:[msd]|re|ve|ll)|n['`\u0091\u0092\u2018\u2019\u201b]t")
_DOTS = re.compile(r"\.(?:[ \u00a0]?\.){2,4}")

# Tokens that the protocol drops. Its list has brackets in upper case, so the lower-cased ones are kept.
_DROPPED = frozenset([*"'\"`.?!,:;-", "''", "``", "...", "--", ""])


def ptb_tokenize(caption: str) -> str:
    """The tokens of ``caption``, lower-cased, without punctuation, joined by single spaces.

    A mixed number is one token with a no-break space (``22\\u00a03/4``), which ``str.split`` divides again.
    """
    tokens = (_written(token) for token in _split(caption))
    return " ".join(token for token in tokens if token not in _DROPPED)


def _split(caption: str) -> list[str]:
    """The unmodified tokens of a caption: at every position the longest match of any rule, lookahead included.

    Characters that no rule matches are dropped.
    """
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], caption)
    # Several rules look ahead, at least for the end of the line. Line ends within the caption become spaces.
    text = " ".join(text.splitlines()) + "\n"
    tokens, position = [], 0
    while position < len(text):
        match = PLAIN.match(text, position)  # fast path for most words
        if match is None:
            match = max(filter(None, (rule.match(text, position) for rule in RULES)), key=re.Match.end, default=None)
        if match is None:
            position += 1
        else:
            tokens.append(match[1])
            position = match.end(1)
    return tokens


def _written(token: str) -> str:
    if token.isspace():
        return ""
    if token in _WRITTEN:
        return _WRITTEN[token]
    if _ONLY_QUOTES.fullmatch(token):
        return token.translate(_QUOTES)
    if _CONTRACTION.fullmatch(token):
        token = token.translate(_QUOTES)
    elif token in ("---", "----"):
        return "--"
    elif _DOTS.fullmatch(token):
        return "..."
    elif SMILEY.fullmatch(token) or token[0] == "(":
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace("\u00ad", "").replace(" ", "\u00a0").lower()
