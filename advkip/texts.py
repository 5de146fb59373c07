"""Tables in texts: `python -m advkip.texts README.md reports/README.md reports/*/results.json`.

The summary goes between its marks in the one, all rows into the other. A table of experiments that
differ in a few settings (`ablation`) stands between `<!-- grid NAME ... -->` and `<!-- /grid -->`;
each NAME is that of a run's folder, or a pattern of several as 'mnist-fc3-5k-*'.
"""

import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from advkip import ablation, records, tables

MARK = re.compile(r"<!-- grid (?P<names>[^\n]*?) -->\n.*?<!-- /grid -->", re.DOTALL)


def updated(text, mark, table) -> str:
    """A text with a table between its marks <!-- mark --> and <!-- /mark -->.

    Raises:
      ValueError: no such marks.
    """
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {start.strip()} and {end} in the text; add them")
    return f"{before}{start}{table}\n{end}{after}"


def filled(text: str, found: dict[str, dict]) -> str:
    """A text with all its tables made anew, from {name: record}.

    Raises:
      ValueError: a name without a record.
    """

    def fill(match):
        patterns = match["names"].split()
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in found):
                raise ValueError(f"expected a record of {pattern}, got none; pass its results.json")
        some = [r for name, r in found.items() if any(fnmatch(name, p) for p in patterns)]
        return f"<!-- grid {match['names']} -->\n{ablation.table(some)}\n<!-- /grid -->"

    return MARK.sub(fill, text)


def main(readme, report, *paths) -> None:
    """Writes `tables.summary` into a README, and `tables.accuracy` and grids into the report's."""
    found = {Path(path).parent.name: records.read(path) for path in paths}
    for path, mark, table in (
        (readme, "summary", tables.summary), (report, "results", tables.accuracy)
    ):  # fmt: skip
        text = updated(Path(path).read_text(), mark, table(list(found.values())))
        Path(path).write_text(filled(text, found))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: python -m advkip.texts README.md reports/README.md reports/*/results.json")
    main(*sys.argv[1:])
