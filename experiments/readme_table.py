"""Writes the README's tables of measured numbers from result cards.

python -m experiments.readme_table
"""

import dataclasses
import pathlib

from experiments.cards import Card, Row
from jaxcomp.io.files import replacing

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the README: methods down, settings of a card across.

    Attributes:
      name: of the card.
      mark: what stands in the comments around the table.
      columns: (heading, setting of the card).
      metric: shown in the cells, with its 95 % interval.
      sizes: (label, method, metric) of rows below that say how large the compressed weights are.
      caption: below the table; {seeds} is the number of seeds.
      methods: rows to show; empty for all that the card has.
    """

    name: str
    mark: str
    columns: tuple[tuple[str, str], ...]
    metric: str
    sizes: tuple[tuple[str, str, str], ...]
    caption: str
    methods: tuple[str, ...] = ()

    def read(self) -> Card:
        """The card."""
        return Card.from_json((ROOT / "experiments" / "results" / f"{self.name}.json").read_text(encoding="utf-8"))

    @property
    def marks(self) -> tuple[str, str]:
        """Lines before and after the table."""
        return f"<!-- {self.mark}: written by `python -m experiments.readme_table` -->\n", f"<!-- /{self.mark} -->\n"


_PLAIN, _OUTLIERS = "plain model", "outliers injected"
BASELINES = Table(
    name="lm_baselines",
    mark="numbers",
    columns=(
        *((scheme, f"{scheme}, {_PLAIN}") for scheme in ("W4A16", "W3A16", "W2A16")),
        *((f"{scheme}, outliers", f"{scheme}, {_OUTLIERS}") for scheme in ("W8A8", "W6A6", "W4A4")),
    ),
    metric="perplexity, embedded text",
    sizes=(("bits per weight, all metadata", "RTN", "bits per weight"),),
    caption="The embedded decoder (1.3 M parameters) on its held-out text, one run, the same calibration windows for all "
    "methods, {seeds} seeds. Outliers: an exact injection of what large models have. WikiText-2, bytes and all other rows: "
    "`experiments/results/lm_baselines.md`.",
)
ABQ = Table(
    name="abq_llm",
    mark="abq numbers",
    columns=tuple((scheme, f"{scheme} outliers embedded") for scheme in ("W6A6", "W4A4", "W3A8", "W2*A8", "W2A8")),
    metric="perplexity",
    sizes=(
        ("bytes per weight, all metadata", "abq", "bytes_per_weight"),
        ("the same in base 5", "abq", "bytes_per_weight, base5"),
    ),
    caption="The embedded decoder with injected outliers, keys and values at the bits of activations, one run, the same data and "
    "budget for all methods, {seeds} seeds. W2*: five levels. Ablations, WikiText-2, budgets of bytes and decoding speed: "
    "`experiments/results/abq_llm.md`.",
    methods=("float", "rtn", "smoothquant", "gptq", "omniquant", "affinequant", "abq", "abq+rounding"),
)
TABLES = (BASELINES, ABQ)


def render(table: Table, card: Card) -> str:
    """Markdown: the metric with its interval per method and setting; sizes in the last rows."""
    cells = {(row.method, row.setting, row.metric): row for row in card.rows}
    settings = [setting for _, setting in table.columns]
    found = dict.fromkeys(row.method for row in card.rows)
    methods = [m for m in table.methods or found if any((m, s, table.metric) in cells for s in settings)]
    lines = [
        "| perplexity [95 %] | " + " | ".join(heading for heading, _ in table.columns) + " |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for method in methods:
        lines.append(
            f"| {method} | " + " | ".join(_cell(cells.get((method, s, table.metric))) for s in settings) + " |"
        )
    for label, method, metric in table.sizes:
        sizes = [cells.get((method, s, metric)) for s in settings]
        lines.append(f"| {label} | " + " | ".join("-" if row is None else f"{row.value:.2f}" for row in sizes) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def with_table(readme: str, card: Card, table: Table = BASELINES) -> str:
    """The README with a table replaced. Raises ValueError if it lost the table's two marks."""
    begin, end = table.marks
    head, found, rest = readme.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md: expected the lines {begin.strip()} and {end.strip()} around its table")
    caption = table.caption.format(seeds=len(card.seeds))
    return f"{head}{begin}\n{render(table, card)}\n\n{caption}\n\n{end}{tail}"


def main() -> None:
    """Rewrites README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for table in TABLES:
        text = with_table(text, table.read(), table)
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
