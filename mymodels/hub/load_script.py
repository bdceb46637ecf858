"""Run by `clean_process.py` as a script of its own: load a folder without mymodels and report as JSON.

Reads a job from standard input, see `load_in_clean_process`, and writes the report to the file that the job names.
"""

import json
import sys

sys.modules["mymodels"] = None  # type: ignore[assignment]  # from here on `import mymodels` fails, installed or not

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def main() -> None:
    job = json.load(sys.stdin)
    models = {}
    outputs = {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["path"], trust_remote_code=True)
    batch = tokenizer(job["texts"], padding=True, truncation=True, return_tensors="pt")
    for name in job["auto_classes"]:
        model, loading = getattr(transformers, name).from_pretrained(
            job["path"], trust_remote_code=True, device_map=job["device_map"], output_loading_info=True
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
    save_file(outputs, job["outputs"])
    with open(job["report"], "w", encoding="utf-8") as file:
        json.dump({"transformers": transformers.__version__, "models": models}, file)


main()
