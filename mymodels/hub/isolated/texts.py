"""Stage of `load_in_clean_process`: tokenize texts, run the models on them, and generate."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file


def run(job: dict[str, Any], events: Any) -> None:
    models, outputs = {}, {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=True)
    batch = tokenizer(job["texts"], padding=True, truncation=True, return_tensors="pt")
    for name in job["classes"]:
        model, loading = getattr(transformers, name).from_pretrained(
            job["folder"], trust_remote_code=True, device_map=job["device_map"], output_loading_info=True
        )
        model.eval()
        with torch.inference_mode():
            outputs[name] = model(**batch)[0].contiguous().clone()
            continuation = None
            if job["prompt"] is not None and model.can_generate():
                prompt = tokenizer(job["prompt"], return_tensors="pt")
                tokens = model.generate(**prompt, max_new_tokens=job["max_new_tokens"], do_sample=False)
                continuation = tokenizer.decode(tokens[0], skip_special_tokens=True)
        models[name] = {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "missing_keys": sorted(loading["missing_keys"]),
            "unexpected_keys": sorted(loading["unexpected_keys"]),
            "mismatched_keys": sorted(map(str, loading["mismatched_keys"])),
            "continuation": continuation,
        }
    save_file(outputs, Path(job["scratch"], "outputs.safetensors"))
    report = {"transformers": transformers.__version__, "models": models}
    Path(job["scratch"], "report.json").write_text(json.dumps(report), encoding="utf-8")
