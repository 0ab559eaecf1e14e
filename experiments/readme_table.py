"""Writes the README's table of measured numbers from the result card of the baselines.

python -m experiments.readme_table
"""

import pathlib

from experiments.cards import Card, Row
from jaxcomp.io.files import replacing

ROOT = pathlib.Path(__file__).parents[1]
CARD = ROOT / "experiments" / "results" / "lm_baselines.json"
BEGIN, END = "<!-- numbers: written by `python -m experiments.readme_table` -->\n", "<!-- /numbers -->\n"
COLUMNS = (  # (heading, scheme, model)
    ("W4A16", "W4A16", "plain model"),
    ("W3A16", "W3A16", "plain model"),
    ("W2A16", "W2A16", "plain model"),
    ("W8A8, outliers", "W8A8", "outliers injected"),
    ("W6A6, outliers", "W6A6", "outliers injected"),
    ("W4A4, outliers", "W4A4", "outliers injected"),
)
METRIC = "perplexity, embedded text"


def table(card: Card) -> str:
    """Methods down, schemes across: perplexity with its 95 % interval; bits per weight in the last row."""
    cells = {(row.method, row.setting, row.metric): row for row in card.rows}
    settings = [f"{scheme}, {model}" for _, scheme, model in COLUMNS]
    methods = [
        m for m in dict.fromkeys(row.method for row in card.rows) if any((m, s, METRIC) in cells for s in settings)
    ]
    lines = [
        "| perplexity [95 %] | " + " | ".join(heading for heading, *_ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(_cell(cells.get((method, s, METRIC))) for s in settings) + " |")
    bits = [cells.get(("RTN", s, "bits per weight")) for s in settings]
    lines.append(
        "| bits per weight, all metadata | " + " | ".join("-" if b is None else f"{b.value:.2f}" for b in bits) + " |"
    )
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def with_table(readme: str, card: Card) -> str:
    """The README with its table replaced. Raises ValueError if it lost the two marks."""
    head, found, rest = readme.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not (found and closed):
        raise ValueError(f"README.md: expected the lines {BEGIN.strip()} and {END.strip()} around its table")
    caption = (
        "The embedded decoder (1.3 M parameters) on its held-out text, one run, the same calibration windows for all methods, "
        f"{len(card.seeds)} seeds. Outliers: an exact injection of what large models have. WikiText-2, bytes and all other rows: "
        "`experiments/results/lm_baselines.md`."
    )
    return f"{head}{BEGIN}\n{table(card)}\n\n{caption}\n\n{END}{tail}"


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), Card.from_json(CARD.read_text(encoding="utf-8")))
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
