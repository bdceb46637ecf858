"""A Hub folder, its own code, two processes: `torchrun remote_parallel.py FOLDER AUTO_CLASS OUT`, without mymodels."""

import os
import sys

import torch
import transformers
from torch.distributed.tensor import DTensor

sys.modules["mymodels"] = None  # type: ignore[assignment]


def main(folder: str, auto_class: str, out: str) -> None:
    torch.set_num_threads(1)
    parallel = {"tp_plan": "auto"} if "WORLD_SIZE" in os.environ else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, **parallel).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    inputs = tokenizer(["Once upon a time", "The scarecrow said that"], padding=True, return_tensors="pt")
    labels = inputs.input_ids if model.can_generate() else torch.tensor([0, 1])
    output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    sharded = sum(isinstance(gradient, DTensor) for gradient in gradients.values())
    gradients = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    result = {"logits": output.logits.detach(), "gradients": gradients, "sharded": sharded}
    if model.can_generate():
        result["tokens"] = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    torch.save(result, f"{out}-{os.environ.get('RANK', '-')}.pt")
    if parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
