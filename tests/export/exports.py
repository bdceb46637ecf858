"""Models to export, and how their README's lines are run: in a process that has neither mymodels nor transformers."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from tiny import SWITCHES, mybert_config, mygpt2_config
from transformers import PreTrainedModel

import mymodels

ROOT = Path(__file__).parents[2]

# every switch, in few graphs
COMBINED = {
    "stock": {},
    "everything": {**SWITCHES["everything"], "rope_theta": 500.0},
    "learned-window": {
        "sliding_window": 4,
        "num_key_value_heads": 1,
        "scale_attn_by_inverse_layer_idx": True,
        "qk_norm": True,
    },
    "no-positions": {"position_embedding_type": "none", "mlp_type": "gated", "activation_function": "silu"},
}

BERTS = {
    **{f"pooling-{pooling}": ("SequenceClassification", {"pooling": pooling}) for pooling in ("pooler", "cls", "mean")},
    "pooling-max": ("SequenceClassification", {"pooling": "max", "layer_mix": 2, "num_hidden_layers": 2}),
    "pooling-attention": ("SequenceClassification", {"pooling": "attention"}),
    "tokens": ("TokenClassification", {"num_labels": 4}),
    "answers": ("QuestionAnswering", {}),
    "masked": ("MaskedLM", {}),
    "masked-untied": ("MaskedLM", {"tie_word_embeddings": False}),
    "bare": ("", {"pooling": "mean"}),
}


def mygpt2(head: str = "CausalLM", **changes) -> PreTrainedModel:
    """A small MyGPT2 that is unsure of nothing: differences show."""
    cls = getattr(mymodels, f"MyGPT2For{head}" if head else "MyGPT2Model")
    return cls(mygpt2_config(**changes)).eval()


def mybert(head: str, **changes) -> PreTrainedModel:
    model = getattr(mymodels, f"MyBertFor{head}" if head else "MyBertModel")(
        mybert_config(**{"num_hidden_layers": 1, **changes})
    )
    for name, parameter in model.named_parameters():
        if "bias" in name or "layer_mix" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


def lines_that_run_it(folder: Path) -> str:
    """The code in an exported folder's README."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def run_lines(folder: Path, more: str = "") -> str:
    """What these lines print, run as they stand and then `more`, in a fresh process."""
    strangers = "import sys\nassert not {'mymodels', 'transformers'} & set(sys.modules), 'not by itself'\n"
    code = f"{lines_that_run_it(folder)}\n{strangers}{more}"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
