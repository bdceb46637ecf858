"""README's table of speed, in Markdown, from what the benchmarks wrote: `python benchmarks/speed_table.py [RESULTS]`."""

import json
import sys
from pathlib import Path

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


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results"
    print(*lines(folder), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
