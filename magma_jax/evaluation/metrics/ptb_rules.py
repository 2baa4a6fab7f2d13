"""The rules of ``ptb``: patterns of tokens, each with a required lookahead.

At every position Stanford's program takes the rule with the longest match, lookahead included, and the first of equals.
The rules were found by running it on all abbreviations of up to five letters, every character of the basic plane, and
some hundred thousand random strings.
"""

import re

# Letters and digits of the basic plane: accents may be separate characters, numerals such as one half are neither.
_OTHERS = (
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff\u2776-\u2793"
    "\U00010000-\U0010ffff"
)
_LETTER = rf"(?:(?![{_OTHERS}])[^\W\d_]|[\u02c2-\u036f])"
_ALNUM = rf"(?:(?![{_OTHERS}])[^\W_]|[\u02c2-\u036f])"
_APOSTROPHE = "['\u0092\u2019]"
_TICK = "['`\u0091\u0092\u2018\u2019\u201b]"
_SPACE = "[ \t\u00a0\u2000-\u200a\u3000]"
_QUOTE = "[`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]"

# A full stop, question or exclamation mark before a letter is part of a word.
_STRETCH = rf"(?:{_LETTER}|\u00ad)(?:{_ALNUM}|\u00ad)*"
_WORD = rf"{_STRETCH}(?:[.!?]{_STRETCH})*"
_PART = rf"(?:[dDoOlL]{_TICK}{_ALNUM})?{_ALNUM}+"
_COMPOUND = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
_HYPHENATED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_INITIALS}\.|[A-Za-z0-9\u00ad]+))+"
_CAPITALS = "[A-Z]+(?:[+&][A-Z]+)+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NUMBER = r"\d*(?:[.,:\u00ad\u066b\u066c]\d+)+|\d+"

_EXTENSIONS = (
    "bat|bmp|cgi|cpp|c|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt|wav|xml|x|"
    "zip"
)

_REST = r"[^ \t\n\"<>|()]+[^ \t\n\"<>|.!?(){},-]"
_SITE = (
    r"(?:(?i:www)\.(?:[^ \t\n\"<>|.!?(){},]+\.)+[A-Za-z]{2,4}"
    r"|(?:[^ \t\n\"`'|!$(){},-_]+\.)+(?i:com|net|org|edu))"
)

# Abbreviations that always keep their period, found by trying all words of up to five letters: those before names, and
# those that may end a sentence, whose match counts two more characters.
_TITLES = (
    "adj|adm|adv|alex|assoc|asst|atty|attys|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|dr|"
    "drs|elec|ens|ft|gen|gov|govs|hon|insp|invt|jos|lieut|lt|maj|messrs|mlle|mme|mr|mrs|ms|msgr|"
    "mt|natl|pfc|ph|pres|prof|profs|pvt|rep|reps|rev|sen|sens|sfc|sgt|spc|st|ste|supt|supts|"
    "treas|vs|wm"
)
_ABBREVIATIONS = (
    "al|ala|apr|ariz|assn|aug|bhd|bldg|blvd|bros|calif|co|colo|conn|corp|cos|ct|dak|dec|esq|est|"
    "etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kan|kans|ky|ltd|mar|md|mich|minn|mo|"
    "mon|mont|neb|nev|nov|oct|okla|penn|plc|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|tue|"
    "tues|univ|va|vt|wed|wis|wisc|wyo"
)
# These are also words, and count as abbreviations when capitalised ...
_ABBREVIATIONS_CAPITALISED = "Az|AZ|Ark|ARK|Del|DEL|Ill|ILL|La|LA|Mass|MASS|Miss|MISS|Ore|ORE|Pa|PA|Tex|TEX|Wash|WASH"
# ... and these before a number.
_ABBREVIATIONS_NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
# After one of these a single letter ends its sentence: "vitamin C. The".
_BEGINNINGS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Mr\\.|Ms\\.|"
    "Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|When|While|Yet|You"
)

# Single-character tokens. Like the program, the rules drop all other characters that are not letters.
_SYMBOLS = (
    "!-~\u0080\u0091-\u0094\u0096\u0097\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7"
    "\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d"
    "\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd\u2013-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044"
    "\u2070\u2074-\u207e\u2080-\u208e\u20a0\u20a4\u20ac\u2100\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118"
    "\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d\u214f\u2153-\u215e\u2190-\u2bff"
    "\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)

_EYES = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
SMILEY = re.compile(_EYES)

# Token, and its lookahead if any.
_RULES = (
    # Contractions. Of those without an apostrophe only the first half is matched; the second is then a word.
    (r"(?i:can)", "(?i:not)"),
    (r"(?i:gon|wan)", "(?i:na)"),
    (r"(?i:got)", "(?i:ta)"),
    (r"(?i:lem|gim)", "(?i:me)"),
    (r"(?i:'t)", "(?i:is|was)"),
    (_WORD, rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"),
    (r"[A-Za-z]*[A-MO-Za-mo-z]", rf"(?i:n){_TICK}(?i:t)"),
    (rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)", "[^A-Za-z]"),
    # Words that an apostrophe does not split.
    (rf"{_APOSTROPHE}(?i:n){_APOSTROPHE}?", ""),
    (rf"[dDjJlL]{_APOSTROPHE}", ""),
    (rf"[yY]{_APOSTROPHE}", _LETTER),
    (rf"(?i:dunkin|somethin|ol){_APOSTROPHE}", ""),
    (rf"(?i:{_APOSTROPHE}(?:em|till?|cause)|cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cap'n|c'est)", ""),
    (rf"[A-HJ-XZn]{_TICK}{_LETTER}{{2,}}", ""),
    (rf"{_LETTER}+[aeiouyAEIOUY]{_TICK}[aeiouA-Z]{_LETTER}*", ""),
    (rf"{_APOSTROPHE}[2-9]0(?i:s)", ""),
    (rf"{_APOSTROPHE}\d\d", _SPACE + "|\n"),
    # An apostrophe that opens a quotation.
    ("'", r"[A-Za-z][^ \t\n\u00a0]"),
    (rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll)|(?i:n){_TICK}(?i:t)", ""),
    # Addresses.
    (rf"(?i:https?)://{_REST}", ""),
    (_SITE, ""),
    (rf"{_SITE}\.", "[,;:\u3001]"),
    (rf"{_SITE}/{_REST}", ""),
    (rf"{_SITE}/{_REST}\.", "[,;:\u3001]"),
    (r"<?[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+>?", ""),
    # Words. Before , ; and : they keep a period.
    (_WORD, ""),
    (rf"{_WORD}\.", "[,;:\u3001]"),
    # Abbreviations.
    (rf"(?i:{_TITLES})\.|[Mm][ft][gG]\.", ""),
    (rf"(?:(?i:{_ABBREVIATIONS})|{_ABBREVIATIONS_CAPITALISED}|[Pp]?[Pp]t[ey][sS]?)\.", "(?s:.{0,2})"),
    # Compounds with hyphens, underscores, slashes and ampersands.
    (_COMPOUND, ""),
    (rf"{_COMPOUND}\.", "[,;:\u3001]"),
    (_CAPITALS, ""),
    (rf"{_CAPITALS}\.", "[,;:\u3001]"),
    (rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}", ""),
    (_HYPHENATED, ""),
    (rf"{_HYPHENATED}\.", "[,;:\u3001]"),
    (r"[cC]\+\+|[cCfF]#", ""),
    (r"(?i:pro-|anti-|S&P-500|S&Ls)", ""),
    # Acronyms keep their periods; so does a single letter, unless a new sentence plainly follows.
    (rf"(?i:{_ABBREVIATIONS_NUMBERED})\.", rf"{_SPACE}?\d"),
    (rf"{_INITIALS}\.|(?i:ph|ed)\.(?i:d)\.", ""),
    (r"[A-Za-z]", rf"\.(?:{_SPACE}|\n)+(?:{_BEGINNINGS})(?:{_SPACE}|\n)"),
    (r"[A-Za-z]\.", ""),
    (rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_EXTENSIONS})", r"[ \t\n\u00a0.?!,]"),
    # Dates, fractions (a whole number before one belongs to it), numbers, telephones, currencies.
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
    (r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", ""),
    (rf"[-+]?(?:{_NUMBER})", ""),
    (r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}", ""),
    (r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", ""),
    (r"[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+|[\u2080-\u2089]+", ""),
    (r"[A-Z]*\$", ""),
    # Names, tags and smileys.
    (r"@[A-Za-z_][A-Za-z_0-9]*", ""),
    (rf"#{_LETTER}+", ""),
    (r"</[A-Za-z][A-Za-z0-9_:.-]* *>", ""),
    (r"<[!?][A-Za-z-][^>\n]*>", ""),
    (r"<[A-Za-z][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?)* */?>", ""),
    (r"(?i:-[lr][rcs]b-)", ""),
    (_EYES, "[^A-Za-z0-9]"),
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", ""),
    # Runs of punctuation that form one token, then whatever is left.
    (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.", ""),
    (r"-+|@+|#+|_+|[?!]+|\*+|(?:\\\*){1,3}|<<|>>|''", ""),
    (rf"{_QUOTE}{{1,2}}", ""),
    ("&(?:lt|gt|MD|mdash|ndash);", ""),
    (f"[{_SYMBOLS}]", ""),
    (f"{_SPACE}+", ""),
)
RULES = tuple(re.compile(f"({token})(?:{follows})") for token, follows in _RULES)
# Words followed by a space that no rule splits.
PLAIN = re.compile(r"(?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)\s)([A-Za-z]+)(?=[ \n])")
