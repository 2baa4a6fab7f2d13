"""The figures of the paper's Tables 1 and 2, for comparison.

Questions in percent; CIDEr and BLEU-4 times 100, captions not tokenised (nlg-eval). Rows of Table 1 name the adapters:
sequential or parallel, and their downsampling factors at attention and MLP.
"""

import itertools
from types import MappingProxyType

from magma_jax.evaluation.results.columns import Column

SHOTS = (0, 1, 2, 4)
DOMAINS = ("in-domain", "out-domain", "near-domain", "all")

_QUESTIONS = """
MAGMA long                  61.5 - - -           40.3 - - -           49.6 - - -           16.7 - - -
MAGMA base                  60.0 - - -           37.6 - - -           47.4 - - -           15.9 - - -
sequential, MLP 2           34.7 40.1 42.2 43.2  12.4 16.9 18.6 21.5  8.2 14.1 19.2 24.6   5.3 7.4 7.8 9.7
sequential, MLP 4           32.7 40.2 42.5 43.8  11.7 16.3 19.1 21.2  6.8 15.6 22.1 27.7   4.2 6.7 6.9 8.6
sequential, attn 8, MLP 8   36.6 41.7 43.8 45.2  13.9 17.1 20.0 22.5  14.3 20.7 24.9 28.4  5.6 8.5 8.6 9.8
sequential, attn 12, MLP 6  36.9 41.2 43.6 44.7  13.9 19.4 21.6 23.2  12.8 18.8 22.5 25.8  5.3 9.6 9.8 10.6
parallel, MLP 4             36.5 41.7 43.1 43.8  14.5 18.4 20.3 21.8  11.2 16.3 19.9 23.2  4.6 8.4 8.4 9.2
scaled parallel, 8, 8       34.9 42.2 44.1 45.4  12.9 17.7 21.4 23.4  8.8 15.6 20.2 24.5   4.3 7.9 8.5 9.9
no adapters                 36.4 41.5 41.7 41.8  12.5 16.2 16.0 16.5  12.6 20.8 23.6 26.9  2.9 5.3 5.5 6.7
NF-ResNet                   32.0 37.0 39.0 39.7  9.8 15.8 18.9 20.8   9.1 20.2 27.1 28.7   2.8 5.6 6.5 8.2
CLIP ViT-B/32               32.8 33.9 36.7 37.7  10.5 9.2 12.4 14.2   8.4 14.9 22.2 25.7   2.7 5.1 5.2 7.7
CLIP RN50x4                 35.2 40.0 42.6 44.2  12.6 17.7 19.0 21.8  10.5 13.0 16.1 20.5  5.0 6.2 6.6 8.3
CLIP RN50x16                32.7 40.2 42.5 43.8  11.7 16.3 19.1 21.2  6.8 15.6 22.1 27.7   4.2 6.7 6.9 8.6
Frozen, rebuilt             28.6 36.7 37.9 38.1  6.2 15.1 16.2 15.8   8.7 23.5 27.0 27.5   1.7 5.4 6.2 8.0
"""

_CAPTIONS = """
MAGMA long                  58.1 62.0 56.9 58.1  13.3 8.5 13.2 12.3  57.0 17.6
MAGMA base                  55.8 56.5 49.9 52.1  11.1 6.1 10.3 9.5   51.1 15.8
sequential, MLP 2           37.7 55.5 40.6 43.2  6.2 6.1 6.5 6.4     33.4 9.4
sequential, MLP 4           39.3 56.2 44.0 45.8  6.3 6.7 7.7 7.3     39.6 11.2
sequential, attn 8, MLP 8   38.2 49.5 40.9 42.2  6.4 4.9 6.7 6.3     37.1 10.6
sequential, attn 12, MLP 6  51.9 64.8 54.6 56.2  11.4 8.4 11.3 10.8  46.3 13.9
parallel, MLP 4             37.5 38.1 35.9 36.0  7.2 5.1 6.7 6.4     36.3 10.8
scaled parallel, 8, 8       40.6 58.3 45.0 47.1  8.0 6.6 7.9 7.7     39.5 11.2
no adapters                 45.1 53.7 43.3 45.7  9.9 5.8 7.9 7.8     36.7 10.3
NF-ResNet                   22.5 16.2 22.0 20.9  5.0 1.6 5.3 4.5     22.4 8.2
CLIP ViT-B/32               33.2 44.2 35.3 36.8  5.9 5.2 5.8 5.7     27.2 7.7
CLIP RN50x4                 47.7 43.6 48.1 50.2  9.3 6.7 9.2 8.7     41.9 13.1
CLIP RN50x16                39.3 56.2 44.0 45.8  6.3 6.7 7.7 7.3     39.6 11.2
"""

# Table 2: one model per task, no shots. "Best known" is the best published result as of December 2021.
_FINETUNED = """
finetuned (Table 2)         68.0 49.2 54.5 35.4  79.0  93.6 27.8  91.2 31.4
best known (Table 2)        75.5 48.0 72.1 54.7  86.3  112.2 33.1  143.3 41.7
"""

_QUESTION_COLUMNS = [
    Column(task, shots, "accuracy") for task, shots in itertools.product(("vqav2", "okvqa", "gqa", "vizwiz"), SHOTS)
]
_CAPTION_COLUMNS = [
    *(Column("nocaps", 0, metric, domain) for metric in ("CIDEr", "BLEU-4") for domain in DOMAINS),
    *(Column("coco", 0, metric) for metric in ("CIDEr", "BLEU-4")),
]
_FINETUNED_COLUMNS = [
    *(Column(task, 0, "accuracy") for task in ("vqav2", "okvqa", "gqa", "vizwiz", "snli_ve")),
    *(Column("nocaps", 0, metric, "all") for metric in ("CIDEr", "BLEU-4")),
    *(Column("coco", 0, metric) for metric in ("CIDEr", "BLEU-4")),
]


def _rows() -> dict[str, dict[Column, float]]:
    rows: dict[str, dict[Column, float]] = {}
    tables = ((_QUESTIONS, _QUESTION_COLUMNS), (_CAPTIONS, _CAPTION_COLUMNS), (_FINETUNED, _FINETUNED_COLUMNS))
    for text, columns in tables:
        for line in text.strip().splitlines():
            name, values = line[:26].strip(), line[26:].split()
            found = {c: float(v) for c, v in zip(columns, values, strict=True) if v != "-"}
            rows.setdefault(name, {}).update(found)
    return rows


# Row to column to figure.
FIGURES: MappingProxyType[str, dict[Column, float]] = MappingProxyType(_rows())
