"""What the box costs: the same folder loaded by `mymodels.load(…, isolated=True)` and by `from_pretrained` in this process.

    python benchmarks/isolation.py [--short] [--threads N] [--json FILE] [--figure FILE]

Classifying a batch of 32 (BERT's base geometry, 128 tokens each), and greedy tokens of a model of 124M, by `generate`
and by one forward per token with the cache in the box. The rival is the plain process, in the same run, in turn; the
ratio is its time by the box's, so 0.97 is 3 % of cost. The start: a process that imports torch and transformers and
loads the model, beside the same in the box; its row holds seconds, and the target is half a second more.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pairs
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mymodels
from mymodels import MyBertConfig, MyBertForSequenceClassification, MyGPT2Config, MyGPT2ForCausalLM, sandbox

EMPTY = "print(1)"
LOADED = """
import sys, torch, transformers
print(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).num_parameters())
"""


def classify(root: Path, short: bool) -> dict[str, Any]:
    layers = 3 if short else 12
    folder = root / "classifier"
    MyBertForSequenceClassification(MyBertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.randint(1000, 20_000, (32, 128))
    with (
        mymodels.load(folder, auto_class="AutoModelForSequenceClassification", isolated=True) as boxed,
        torch.inference_mode(),
    ):
        return pairs.compare(
            f"classifying 32 × 128 tokens, {layers} layers",
            lambda: boxed(input_ids=ids).logits,
            lambda: plain(input_ids=ids).logits,
            rival_name="the plain process",
            repeats=5 if short else 15,
            target=0.97,
        )


def tokens(root: Path, short: bool) -> list[dict[str, Any]]:
    folder, count, repeats = root / "generator", 16 if short else 64, 5 if short else 15
    MyGPT2ForCausalLM(MyGPT2Config()).save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(1000, 20_000, (1, 32))

    def generate(model: Any) -> torch.Tensor:
        return model.generate(
            input_ids=ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    def step_by_step(model: Any) -> torch.Tensor:
        found, cache, new = [], None, ids
        for _ in range(count):
            output = model(input_ids=new, past_key_values=cache, use_cache=True)
            cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(new)
        return torch.cat(found, dim=1)

    rows = []
    with mymodels.load(folder, auto_class="AutoModelForCausalLM", isolated=True) as boxed, torch.inference_mode():
        for name, call in (("generate", generate), ("a forward per token", step_by_step)):
            rows.append(
                pairs.compare(
                    f"{count} tokens of a model of 124M, {name}",
                    lambda call=call: call(boxed),
                    lambda call=call: call(plain),
                    rival_name="the plain process",
                    repeats=repeats,
                    target=0.95,
                )
            )
    return rows


def start(root: Path, short: bool) -> list[dict[str, Any]]:
    """Seconds from nothing to a loaded model; the difference counts, so the ratio has no target."""
    folder = root / "generator"

    def in_box() -> int:
        with mymodels.load(folder, auto_class="AutoModelForCausalLM", isolated=True) as model:
            return model.num_parameters()

    def plainly() -> int:
        run = subprocess.run([sys.executable, "-c", LOADED, folder], check=True, capture_output=True)
        return int(run.stdout)

    def empty_in_box() -> int:
        with tempfile.TemporaryDirectory() as scratch:
            return int(sandbox.run(["-c", EMPTY], scratch=Path(scratch)).stdout)

    def empty() -> int:
        return int(subprocess.run([sys.executable, "-I", "-c", EMPTY], check=True, capture_output=True).stdout)

    rows = []
    for work, ours, rival in (
        ("start: Python alone", empty_in_box, empty),
        ("start: a model of 124M loaded", in_box, plainly),
    ):
        row = pairs.compare(work, ours, rival, rival_name="a plain process", repeats=3 if short else 9)
        more = sorted(mine - theirs for mine, theirs in zip(row["times"]["ours"], row["times"]["rival"]))
        row["seconds_more"] = more[len(more) // 2]
        row["work"] += f", {row['seconds_more']:+.2f} s"
        rows.append(row)
    return rows


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    isolation = sandbox.available()
    if not isolation.confined:
        raise SystemExit(str(isolation))
    print(isolation)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rows = [classify(root, arguments.short), *tokens(root, arguments.short), *start(root, arguments.short)]
    return pairs.finish(rows, arguments)


if __name__ == "__main__":
    sys.exit(main())
