"""Writes the table of what every kind of language model supports in docs/language_models.md, from tests.

python scripts/support_table.py            # runs the tests marked supports: writes docs/support.json and the table
python scripts/support_table.py --check    # runs them; exits with 1 if the table does not say what they show
python scripts/support_table.py --render   # only writes the table

It also exits with 1, and names the cells, if there are some that no test fills.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from magma_jax.published.hf_config import CONFIGS

ROOT = Path(__file__).parent.parent
DOCUMENT, RESULTS = ROOT / "docs/language_models.md", ROOT / "docs/support.json"
BEGIN, END = "<!-- support: python scripts/support_table.py -->\n", "<!-- end of support -->\n"
TESTS = (
    "tests/models/test_language_model_parity.py",
    "tests/models/test_language_models_of_today.py",
    "tests/training/test_language_models.py",
)
COLUMNS = (
    *("converts in", "round trip", "matches transformers", "cached decoding"),
    *("trains", "8 bits", "4 bits", "served"),
)

# Kind to column to the tests that show it, and the largest of their figures.
Support = dict[str, dict[str, dict[str, Any]]]


def measured() -> Support:
    """Runs the tests and collects what those that passed have recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-n", "0", "-m", "supports", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *TESTS], cwd=ROOT, check=False, stdout=sys.stderr)
        return collected(ElementTree.parse(report).getroot())


def collected(report: ElementTree.Element) -> Support:
    """What the passed tests of a JUnit report have recorded."""
    found: Support = {}
    for case in report.iter("testcase"):
        if any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            continue
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        for entry in case.iter("property"):
            mark, _, place = entry.get("name", "").partition("|")
            if mark != "supports":
                continue
            kind, _, column = place.partition("|")
            cell = found.setdefault(kind, {}).setdefault(column, {"tests": []})
            cell["tests"] = sorted({*cell["tests"], test})
            if value := entry.get("value"):
                cell["figure"] = max(float(value), cell.get("figure", 0.0))
    return {kind: {column: cells[column] for column in sorted(cells)} for kind, cells in sorted(found.items())}


def lacking(found: Support) -> list[str]:
    """Cells of the table that no test has filled."""
    return [f"{kind}: {column}" for kind in CONFIGS for column in COLUMNS if column not in found.get(kind, {})]


def table(found: Support) -> str:
    """The table, a row per kind."""
    lines = [f"| `kind` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| `{kind}` | {' | '.join(_cell(found.get(kind, {}).get(column)) for column in COLUMNS)} |" for kind in CONFIGS
    ]
    return "\n".join(lines) + "\n"


def _cell(shown: dict[str, Any] | None) -> str:
    if shown is None:
        return "not recorded"
    if (figure := shown.get("figure")) is None:
        return "yes"
    return f"{figure:.1e}" if figure < 1e-3 else f"{100 * figure:.1f} %"


def document(found: Support) -> str:
    """The page with the table."""
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{DOCUMENT}: lacks the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{table(found)}\n{END}{after}"


def stored() -> Support:
    """What the tests showed when the table was written."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def tests_of(found: Support) -> set[tuple[str, str, str]]:
    """Kind, column and test of every cell; figures differ in their last digits between machines."""
    return {(kind, column, test) for kind in found for column, cell in found[kind].items() for test in cell["tests"]}


def main() -> int:
    """Runs the command; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="compare the table with the tests")
    how.add_argument("--render", action="store_true", help="write the table from docs/support.json")
    arguments = parser.parse_args()
    found = stored() if arguments.render else measured()
    if arguments.check:
        now, before = tests_of(found), tests_of(stored())
        for kind, column, test in sorted(before - now):
            print(f"{kind}: {column}: {test} shows it no more")
        for kind, column, test in sorted(now - before):
            print(f"{kind}: {column}: {test} shows it, which docs/support.json does not say")
        return int(now != before or _report(found))
    text = document(found)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(text, encoding="utf-8")
    return int(_report(found))


def _report(found: Support) -> bool:
    """Whether cells are lacking, which are printed."""
    for cell in lacking(found):
        print(f"no test shows {cell}")
    return bool(lacking(found))


if __name__ == "__main__":
    sys.exit(main())
