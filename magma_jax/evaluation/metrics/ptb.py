"""Penn Treebank tokenisation of captions, as the coco protocol has it done by Stanford's tokenizer.

Captions are scored on these tokens, so the scores of the literature depend on what that program does: it splits
``isn't`` into ``is n't``, keeps ``p.m.`` whole, writes ``(`` as ``-lrb-``, leaves ``dog.A`` alone. Its behaviour is
restated here from observation of version 3.4.1 with ``-preserveLines -lowerCase``; ``ptb_rules`` has the rules.

Not restated: the program looks at the next caption of its file where one ends in a single letter or ``no.`` with a
period, and takes one with U+2028, U+0085 or a form feed for several; some letters of scripts other than Latin, Greek
and Cyrillic; soft hyphens within file names.
"""

import re

from magma_jax.evaluation.metrics.ptb_rules import PLAIN, RULES, SMILEY

_ENTITIES = {"&amp;": "&", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
_ENTITY = re.compile("|".join(_ENTITIES))

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Tokens that are written otherwise. The treebank knows dollars, cents and "#"; it spells fractions.
_WRITTEN = {
    **_BRACKETS,
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    **{"\u00a3": "#", "\u00a2": "cents", "\u2026": "..."},
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **dict.fromkeys(["\u0096", "\u0097", "\u2013", "\u2014", "\u2015", "&MD;", "&mdash;", "&ndash;"], "--"),
    **{"&lt;": "<", "&gt;": ">"},
}
# Quotation marks, in tokens that consist of them: opening and closing ones are told apart.
_QUOTES = str.maketrans(
    dict.fromkeys("\u0091\u2018\u201b\u2039", "`")
    | dict.fromkeys("\u0092\u2019\u203a", "'")
    | dict.fromkeys("\u0093\u201c\u00ab", "``")
    | dict.fromkeys("\u0094\u201d\u00bb", "''")
)
_ONLY_QUOTES = re.compile("['`\u0091-\u0094\u2018\u2019\u201b-\u201d\u2039\u203a\u00ab\u00bb]+")
_CONTRACTION = re.compile("(?i)['\u0092\u2019](?:[msd]|re|ve|ll)|n['`\u0091\u0092\u2018\u2019\u201b]t")
_DOTS = re.compile(r"\.(?:[ \u00a0]?\.){2,4}")

# What the protocol drops. Its list has the brackets in upper case, so the lower-cased ones stay.
_DROPPED = frozenset([*"'\"`.?!,:;-", "''", "``", "...", "--", ""])


def ptb_tokenize(caption: str) -> str:
    """The tokens of ``caption``, lower-cased, without punctuation, joined by single spaces.

    A mixed number is one token with a no-break space (``22\\u00a03/4``), which ``str.split`` divides again.
    """
    tokens = (_written(token) for token in _split(caption))
    return " ".join(token for token in tokens if token not in _DROPPED)


def _split(caption: str) -> list[str]:
    """The tokens as they stand in the caption: at every position that of the rule which sees furthest ahead.

    What no rule takes the program leaves out.
    """
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0]], caption)
    # Several rules ask what follows, if only the end of the line. Any kind of line end is a space here.
    text = " ".join(text.splitlines()) + "\n"
    tokens, position = [], 0
    while position < len(text):
        match = PLAIN.match(text, position)  # most words, for which the rules need not be asked
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
