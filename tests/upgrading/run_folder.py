"""Runs folders under the transformers release that is first on the path: `python run_folder.py OUT [--shapes] NAME …`.

Prints one line of JSON for each: what was computed, or what went wrong. With `--shapes`, writes `shapes.json` from a model
that is made new. It says whether a folder runs under its old release, and whether it breaks under a newer one.
"""

import inspect
import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import folders
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)

IDS = torch.tensor([[5, 9, 13, 4, 21, 8, 30, 11], [7, 3, 44, 6, 17, 25, 9, 12]])


def classes(folder: Path):
    """The Auto classes that the folder serves, the one with a head last."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    return [name for name in auto_map if name.startswith("AutoModel")]


def load(folder: Path, auto: str):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()


def write_shapes(name: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, f"shapes_{name}")
        folders.shutil.copytree(folders.path(name), folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = getattr(transformers, classes(folder)[-1]).from_config(config, trust_remote_code=True)
        model.save_pretrained(Path(work, "out"))
        from safetensors import safe_open

        with safe_open(Path(work, "out", "model.safetensors"), "pt") as file:
            kept = {key: file.get_tensor(key) for key in sorted(file.keys())}
    parameters = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    shapes = {
        key: list(t.shape) if key in parameters else {"dtype": str(t.dtype)[6:], "values": t.tolist()}
        for key, t in kept.items()
    }
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in shapes.items())
    (folders.path(name) / "shapes.json").write_text("{\n" + lines + "\n}\n")


def inputs_for(model, auto: str) -> dict:
    main = model.main_input_name
    if main == "pixel_values":
        size = getattr(model.config, "image_size", None) or 32
        size = size[0] if isinstance(size, (list, tuple)) else size
        return {"pixel_values": torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))}
    if getattr(model.config, "input_size", None) == 1:
        return {"input_ids": torch.randn(2, 8, generator=torch.Generator().manual_seed(0))}
    if main == "input_values":
        return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        del given["attention_mask"]
    return given


def digest(tensor) -> list:
    return [round(float(v), 5) for v in (tensor.float().sum(), tensor.float().abs().mean(), tensor.flatten()[0])]


def main_tensor(out):
    if isinstance(out, torch.Tensor):
        return out
    if isinstance(out, (list, tuple)):
        return main_tensor(out[0])
    return (
        out.logits if getattr(out, "logits", None) is not None else main_tensor(out[0] if "loss" not in out else out[1])
    )


def run(name: str, target: Path) -> dict:
    folder = folders.make(name, target / f"run_{transformers.__version__.replace('.', '_')}_{name}")
    found: dict = {}
    for auto in classes(folder):
        model = load(folder, auto)
        given = inputs_for(model, auto)
        with torch.no_grad():
            extra = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
            found[auto] = digest(main_tensor(model(**given, **extra)))
        if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") and given["input_ids"].dtype == torch.long:
            model.zero_grad()
            loss = model(**given, labels=IDS).loss
            if loss is not None:
                loss.backward()
                grads = [p.grad.abs().sum() for p in model.parameters() if p.grad is not None]
                found["loss"] = [round(float(loss.detach()), 5), round(float(sum(grads)), 3), len(grads)]
        if hasattr(model, "generate") and model.can_generate() and "input_ids" in given:
            common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
            found["cached"] = model.generate(**given, use_cache=True, **common)[:, -6:].tolist()
            found["uncached"] = model.generate(**given, use_cache=False, **common)[:, -6:].tolist()
            if given["input_ids"].dtype == torch.long:
                padded = {k: torch.nn.functional.pad(v, (3, 0)) for k, v in given.items()}
                found["left"] = model.generate(**padded, use_cache=True, **common)[:, -6:].tolist()
        model.save_pretrained(folder / "saved")
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        rows = tokenizer(["hello there", "abc"], padding=tokenizer.pad_token is not None)
        found["tokenizer"] = [rows["input_ids"], rows.get("attention_mask"), tokenizer.decode(rows["input_ids"][0])]
        tokenizer.save_pretrained(folder / "saved")
    if (folder / "preprocessor_config.json").exists():
        import numpy

        picture = (numpy.arange(20 * 24 * 3) % 255).reshape(20, 24, 3).astype("uint8")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        found["processor"] = digest(
            torch.as_tensor(numpy.asarray(processor(picture, return_tensors="np")["pixel_values"]))
        )
    return found


def main(out: str, *asked: str) -> None:
    for name in [a for a in asked if not a.startswith("--")] or folders.names():
        try:
            if "--shapes" in asked:
                write_shapes(name)
            found = run(name, Path(out))
        except BaseException as error:  # what breaks is what is asked for
            if "--trace" in asked:
                traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        print(json.dumps({"name": name, "release": transformers.__version__, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
