"""Page of a comparison: the table, and the examples on which the systems differ most."""

from html import escape
from pathlib import Path

from magma_jax.evaluation.report.comparison import Compared
from magma_jax.evaluation.report.pages import fill_page
from magma_jax.evaluation.tables import html_table
from magma_jax.output import replace_file

# Examples of each result; with more the page helps nobody.
SHOWN = 100


def write_comparison(path: str | Path, compared: Compared) -> None:
    """Writes the page, one file that needs no other."""
    systems = zip(compared.letters, compared.systems, strict=True)
    page = fill_page(
        "comparison",
        title="Comparison",
        systems="".join(f"<li><b>{letter}</b> {escape(system)}</li>" for letter, system in systems),
        table=html_table(compared.rows()),
        notes="".join(f"<p>{escape(note)}</p>" for note in compared.notes()),
        examples="\n".join(_differing(compared, name) for name in compared.answers),
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page.encode())


def _differing(compared: Compared, name: str) -> str:
    rows = [row for row in compared.answers[name] if max(row[2]) > min(row[2])]
    rows.sort(key=lambda row: min(row[2]) - max(row[2]))
    count = f"{len(rows)} of {len(compared.answers[name])} examples have different scores"
    words = f"{count}; {SHOWN} are shown" if len(rows) > SHOWN else count
    cells = [["example", "question", "true answer", *compared.letters]]
    for example, answers, scores in rows[:SHOWN]:
        said = [f"{answer or '(nothing)'} ({score:.3g})" for answer, score in zip(answers, scores, strict=True)]
        cells.append([example.id, example.text, ", ".join(dict.fromkeys(example.answers)), *said])
    table = f'<div class="wide">{html_table(cells)}</div>' if rows else ""
    return f'<h3>{escape(name)}</h3><p class="soft">{words}.</p>{table}'
