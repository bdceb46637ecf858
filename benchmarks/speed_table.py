"""The tables of speed, in Markdown, from what the benchmarks wrote: `python benchmarks/speed_table.py [RESULTS]`."""

import json
import sys
from pathlib import Path
from typing import Any

ORDER = ("classify", "finetune", "train_lm", "generate", "cold_start", "checkpoint_memory")


def lines(folder: Path) -> list[str]:
    table = ["| work | rival | ratio | of the floor | script |", "|---|---|---|---|---|"]
    for name in ORDER:
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        for row in found["rows"]:
            ratio = f"{row['ratio']:.2f}×"
            if "quartiles" in row:
                ratio += " ({:.2f}–{:.2f})".format(*row["quartiles"])
            share = f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else ""
            short = " (short form)" if found["made_with"]["short"] else ""
            table.append(f"| {row['work']} | {row['rival']} | {ratio} | {share} | `benchmarks/{name}.py`{short} |")
    return table


def rivals(folder: Path) -> list[str]:
    """What rivals.py wrote: a line for each work and number of threads, a column for each engine and precision."""
    file = folder / "rivals.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    rows = found["rows"]
    columns = {}
    for row in rows:
        ours = "" if row["ours"] == row["precision"] else f" (ours {row['ours']})"
        columns[row["engine"], row["precision"]] = f"{row['engine']} {row['precision']}{ours}"
    cells: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] >= 1 else f"**{row['ratio']:.2f}**"
        low, high = row["quartiles"]
        column = (row["engine"], row["precision"])
        cells.setdefault((row["task"], row["threads"]), {})[column] = f"{ratio} ({low:.2f}–{high:.2f})"
    table = [_line(["work", "threads", *columns.values()]), _line(["---"] * (len(columns) + 2))]
    table += [_line([work, threads, *(line.get(c, "") for c in columns)]) for (work, threads), line in cells.items()]
    return [*table, "", *map("- {}".format, found["made_with"]["notes"])]


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    print(*lines(folder), sep="\n")
    if engines := rivals(folder):
        print("", *engines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
