"""What an upgrade did, for people, for programs and for the model card."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...messages import printable
from ...tables import print_table

if TYPE_CHECKING:
    from .proof import Proof
    from .upgrade import Upgrade

_SIGNS = {"equal": "✓", "differs": "✗", "failed": "✗", "not compared": "○"}
_ORDER = ("failed", "differs", "not compared", "equal")


def verdict(result: "Upgrade") -> str:
    """One sentence: what was proven, or why nothing was written."""
    proof = result.proof
    if result.refused:
        places = "1 place" if len(result.refused) == 1 else f"{len(result.refused)} places"
        return f"refused: {places} that cannot be repaired; nothing was written"
    if not result.edits:
        return "no rule has anything to change, so nothing was written; `mymodels verify` tells whether it runs"
    if proof is None:
        return "not proven: nothing was run or written (dry run)"
    releases = f"transformers {', '.join(proof.targets)}"
    if proof.holds:
        left = " (what was not compared is listed above)" if proof.not_compared else ""
        with_imports = ", where the original ran with its imports repaired," if proof.imports_only else ""
        return f"proven: the numbers of transformers {proof.old}{with_imports} under {releases}{left}"
    if proof.old is None and proof.runs:
        agrees = (
            f"the original runs under none of transformers {', '.join(proof.tried)}; the result runs under {releases}"
        )
        if result.out is None:
            return f"unproven: {agrees}; nothing was written, --unproven writes it"
        return f"UNPROVEN: {agrees}"
    return f"not proven: {len(proof.bad)} comparisons failed; nothing was written"


def left_lines(result: "Upgrade") -> list[str]:
    """Faults that the code still has: a sentence for each, and for each check that `verify` fails."""
    lines = [f"fault of the original, at {fault.where}: {fault.what}" for fault in result.left]
    under = f" under transformers {result.proof.targets[-1]}" if result.proof is not None else ""
    for fault in result.verify:
        place = f" ({fault.where})" if fault.where else ""
        starts = f"`mymodels verify` fails{under}, which upgrade does not repair: " if fault.status == "failed" else ""
        lines.append(f"{starts}{fault.what}{place}")
    return lines


def report_of(result: "Upgrade") -> dict[str, Any]:
    """Everything as plain data, for JSON."""
    proof = result.proof
    return {
        "path": result.path,
        "out": result.out,
        "verdict": verdict(result),
        "proven": result.proven,
        "refused": [{"what": place.what, "where": place.where} for place in result.refused],
        "edits": [
            {
                "rule": edit.rule,
                "where": f"{edit.file}:{edit.line}" if edit.line else edit.file,
                "what": edit.what,
                "reason": result.rules[edit.rule].reason,
                "releases": result.rules[edit.rule].releases,
            }
            for edit in result.edits
        ],
        "undone": result.undone,
        "left": [{"what": fault.what, "where": fault.where} for fault in result.left],
        "verify": [{"what": fault.what, "where": fault.where} for fault in result.verify],
        "proof": None
        if proof is None
        else {
            "original": proof.old,
            "original_with_imports_repaired": proof.imports_only,
            "tried": proof.tried,
            "releases": proof.targets,
            "properties_of_the_original": proof.properties,
            "compared": [row._asdict() for row in proof.rows],
        },
        "golden": result.golden,
        "mlinter": result.mlinter,
        "diff": result.diff,
    }


def show_upgrade(result: "Upgrade", console: Console, *, diff: bool = False) -> None:
    """Print the edits by rule, what was compared under which release, and the verdict.

    Args:
        diff: print the diff too.
    """
    if diff and result.diff:
        console.print(Text(printable_lines(result.diff)), soft_wrap=True, highlight=False)
    for name, rule in result.rules.items():
        console.print(
            Text(f"{name}  ", style="bold").append(f"({rule.releases}) {rule.reason}", style="dim"), soft_wrap=True
        )
        for edit in result.edits:
            if edit.rule == name:
                place = f"{edit.file}:{edit.line}" if edit.line else edit.file
                console.print(Text(f"  {place}  {printable(edit.what)}"), soft_wrap=True)
    for name, why in result.undone.items():
        console.print(Text(f"taken back: {name}: {printable(why)}", style="yellow"), soft_wrap=True)
    for fault in result.refused:
        console.print(Text(f"refused  {fault.where}  {printable(fault.what)}", style="bold red"), soft_wrap=True)
    if result.proof is not None:
        _show_proof(result.proof, console)
        for what in result.proof.properties:
            console.print(Text(f"{_of_original(result.proof)}: {printable(what)}", style="yellow"), soft_wrap=True)
    if result.golden:
        console.print(Text(f"golden outputs: {printable(result.golden)}"), soft_wrap=True)
    if result.mlinter:
        console.print(Text("transformers-mlinter: {before} findings before, {after} after".format(**result.mlinter)))
    for text in left_lines(result):
        console.print(Text(printable(text), style="yellow"), soft_wrap=True)
    style = "bold green" if result.proven or not (result.edits or result.refused) else "bold yellow"
    style = "bold red" if result.refused or (result.proof is not None and result.proof.bad) else style
    console.print(Text(f"{result.path}: {verdict(result)}", style=style), soft_wrap=True)


def _of_original(proof: "Proof") -> str:
    return f"not from the upgrade, the original under transformers {proof.old} does it too, and verify reports it"


def printable_lines(text: str) -> str:
    """A text from files without control characters, line by line."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _show_proof(proof: "Proof", console: Console) -> None:
    for release, why in proof.tried.items():
        console.print(Text(f"the original under transformers {release}: {printable(why)}", style="dim"), soft_wrap=True)
    imports = " (the original with its imports repaired)" if proof.imports_only else ""
    against = f"transformers {proof.old}{imports}" if proof.old else "each other: there is no original to compare with"
    table = Table("compared", title=f"with the numbers of {against}", title_justify="left")
    for release in proof.targets:
        table.add_column(release, no_wrap=True)
    for name, *signs in rows_of(proof):
        table.add_row(name, *signs)
    print_table(table, console)
    told: set[tuple[str, ...]] = set()
    for row in proof.bad + proof.not_compared:
        releases = ", ".join(r.release for r in proof.rows if r[1:] == row[1:])
        if row[1:] not in told:
            told.add(row[1:])
            place = f"  {row.where}" if row.where else ""
            text = f"{row.status}  {row.item} of {row.name}{place}  under {releases}: {printable(row.what)}"
            console.print(Text(text, style="" if row.status == "not compared" else "bold red"), soft_wrap=True)


def rows_of(proof: "Proof") -> list[list[str]]:
    """For each item a row of its name and a sign of its worst outcome under each release."""
    rows = []
    for item in dict.fromkeys(row.item for row in proof.rows):
        signs = []
        for release in proof.targets:
            found = {row.status for row in proof.rows if row.item == item and row.release == release}
            worst = next((status for status in _ORDER if status in found), "")
            signs.append(_SIGNS.get(worst, "–"))
        rows.append([item, *signs])
    return rows


def card_table(result: "Upgrade") -> str:
    """The section of the model card: what the code was made for, and what was compared."""
    proof = result.proof
    assert proof is not None
    if proof.old is None:
        about = (
            "This folder's code was changed by `mymodels upgrade`. No old release of transformers ran the original, so "
            "nothing proves that it computes what the original did. Below: whether the releases agree with each other."
        )
    else:
        about = (
            f"This folder's code was changed by `mymodels upgrade`. The original ran under transformers {proof.old}"
            f"{', with its imports repaired' if proof.imports_only else ''}; "
            "its numbers (float32, within 1e-5) were compared with those of this code under each release below."
        )
    legend = "✓ the same, ○ not compared (`upgrade.json` says why), – not run."
    head = f"| compared | {' | '.join(proof.targets)} |\n|---|{'---|' * len(proof.targets)}"
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows_of(proof))
    named = f"N{_of_original(proof)[1:]}"
    properties = "".join(f"\n\n{named}: {printable(what)}." for what in proof.properties)
    golden = f"\n\n`golden.safetensors`: {result.golden}." if result.golden else ""
    return f"## Upgraded code\n\n{about}\n{legend}\n\n{head}\n{body}{properties}{golden}"


def card_faults(result: "Upgrade") -> str:
    """The part of the model card on what the code still gets wrong; empty if nothing is known."""
    return "".join(f"\n- {printable(line)}" for line in left_lines(result))
