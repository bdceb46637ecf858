"""Editing a formula is safe: what is written is computed, by no fast path anything else.

Each edit is made in a copied folder, which runs as remote code in a process without mymodels, and once more there with
every fast path off (no oneDNN, eager attention, no skipping of padding): same outputs, same gradients, and not those
of the model that was not edited.
"""

import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from tiny import batch, largest_difference, mybert_config, mygpt2_config
from torch import nn

from mymodels import MyBertForSequenceClassification, MyBertModel, MyGPT2ForCausalLM, MyGPT2Model
from mymodels.models import tokenwise
from mymodels.models.modeling_mygpt2 import MyGPT2GatedMLP

# name: what stands in the modeling file, and what is put there
GPT2_EDITS = {
    "activation": ("self.down_proj(self.act_fn(self.up_proj(x)))", "self.down_proj(torch.tanh(self.up_proj(x)))"),
    "formula": ("self.act_fn(self.gate_proj(x)) * self.up_proj(x)", "self.act_fn(self.gate_proj(x)) + self.up_proj(x)"),
    "activation by name": (
        "self.act_fn = make_activation(config.activation_function)",
        "self.act_fn = nn.LeakyReLU(0.3)",
    ),
    "scaling": ("scaling=self.scaling,", "scaling=self.scaling / 3,"),
    "residual": ("hidden_states + self.dropout(attended)", "0.5 * hidden_states + self.dropout(attended)"),
    "place of the norm": ("self.self_attn(self.input_layernorm(hidden_states)", "self.self_attn((hidden_states)"),
    "tokens mixed": (
        "self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))",
        "self.mlp(hidden_states.roll(1, dims=1))",
    ),
    "tokens summed": (
        "return hidden_states, weights",
        "return hidden_states + hidden_states.cumsum(1) / 7, weights",
    ),
    "tokens summed in embed": (
        "return self.dropout(hidden_states)\n\n    @can_return_tuple",
        "return self.dropout(hidden_states + hidden_states.cumsum(1))\n\n    @can_return_tuple",
    ),
    "tokens summed in the stack": (
        "self.embed(inputs_embeds, token_type_ids, positions)",
        "self.embed(inputs_embeds, token_type_ids, positions).cumsum(1)",
    ),
}
BERT_EDITS = {
    "activation": ("self.intermediate_act_fn(self.dense(hidden_states))", "torch.tanh(self.dense(hidden_states))"),
    "formula": (
        "self.output(self.intermediate(attended), attended)",
        "self.output(self.intermediate(attended) * 0.5, attended)",
    ),
    "scaling": ("scaling=self.scaling,", "scaling=self.scaling / 3,"),
    "residual": ("(self.dense(hidden_states)) + residual", "(self.dense(hidden_states)) + 0.5 * residual"),
    "place of the norm": (
        "self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)",
        "self.LayerNorm(self.dropout(self.dense(hidden_states))) + residual",
    ),
    "tokens mixed": (
        "return self.output(self.intermediate(attended), attended)",
        "return self.output(self.intermediate(attended.roll(1, dims=-2)), attended)",
    ),
    "tokens summed in the stack": ("self.encoder(hidden_states, out", "self.encoder(hidden_states.cumsum(1), out"),
    "tokens summed in the mix": ("return layers[-1]\n", "return layers[-1] + layers[-1].cumsum(1)\n"),
}

RUN = """
import json, os, sys
sys.modules["mymodels"] = None
import torch, transformers
results = {}
def measure(model, inputs, padded):
    model.eval()
    rows = inputs["attention_mask"].bool()
    more = {"output_hidden_states": True} if padded else {}  # which keeps the padding
    with torch.no_grad():
        base = model.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **more)
        short = model.base_model(input_ids=inputs["input_ids"][:1, :5])  # few rows
    model.zero_grad()
    output = model(**inputs, **more)
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [base[0][rows], short[0], output.loss.detach(), *gradients]
for name, folder in json.loads(sys.argv[1]).items():
    auto, inputs = torch.load(f"{folder}.pt")
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    model.config.use_cache = False
    fast = measure(model, inputs, False)
    model.set_attn_implementation("eager")
    with torch.backends.mkldnn.flags(enabled=False):
        plain = measure(model, inputs, True)
    worst = max(((a - b).abs().max() / (1e-3 + b.abs().max())).item() for a, b in zip(fast, plain, strict=True))
    results[name] = [worst, fast[2].item(), fast[0].sum().item()]
print(json.dumps(results))
"""


def make_folders(where: Path) -> dict[str, Path]:
    """The unedited models and each edit of them, by name."""
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gated = {"mlp_type": "gated", "position_embedding_type": "rope", "num_key_value_heads": 2}
    no_bert_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    models = {
        "dense": (MyGPT2ForCausalLM(mygpt2_config(**no_dropout, n_layer=2)), GPT2_EDITS),
        "gated": (MyGPT2ForCausalLM(mygpt2_config(**no_dropout, **gated, n_layer=2)), GPT2_EDITS),
        # wide enough for its MLP to be computed in parts
        "bert": (
            MyBertForSequenceClassification(
                mybert_config(**no_bert_dropout, intermediate_size=16384, num_hidden_layers=2)
            ),
            BERT_EDITS,
        ),
    }
    folders = {}
    for family, (model, edits) in models.items():
        rows = 12
        inputs = batch("right", rows=4) if family != "bert" else batch("right", rows=4, length=40)
        if family == "bert":
            inputs = {key: value.repeat(3, 1) for key, value in inputs.items()}
            inputs["labels"] = torch.arange(rows) % 2
        else:
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        first = where / f"{family}_plain"
        model.save_pretrained(first)
        auto = "AutoModelForSequenceClassification" if family == "bert" else "AutoModelForCausalLM"
        name = "modeling_mybert.py" if family == "bert" else "modeling_mygpt2.py"
        for edit, (old, new) in {"plain": ("", ""), **edits}.items():
            if (family, edit) in {("dense", "formula"), ("gated", "activation")}:
                continue  # of the other MLP
            folder = where / f"{family}_{edit.replace(' ', '_')}"
            if folder != first:
                shutil.copytree(first, folder)
                code = (folder / name).read_text()
                assert old in code, edit
                (folder / name).write_text(code.replace(old, new))
            torch.save((auto, inputs), f"{folder}.pt")
            folders[folder.name] = folder
    return folders


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[float]]:
    where = tmp_path_factory.mktemp("edited")
    folders = {name: str(folder) for name, folder in make_folders(where).items()}
    command = [sys.executable, "-I", "-c", RUN, json.dumps(folders)]
    run = warm_python.run(command, env={"HF_MODULES_CACHE": str(where / "modules")})
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


NAMES = [
    f"{family}_{edit}"
    for family, edits in (("dense", GPT2_EDITS), ("gated", GPT2_EDITS), ("bert", BERT_EDITS))
    for edit in edits
]
NAMES = [name.replace(" ", "_") for name in NAMES if name not in ("dense_formula", "gated_activation")]


@pytest.mark.parametrize("name", NAMES)
def test_an_edited_folder_computes_what_is_written(name: str, results) -> None:
    worst, loss, states = results[name]
    assert worst <= 1e-3
    plain = results[f"{name.split('_')[0]}_plain"]
    assert abs(loss - plain[1]) > 1e-5 or abs(states - plain[2]) > 1e-3


@pytest.mark.parametrize("family", ["dense", "gated", "bert"])
def test_an_unedited_folder_computes_it_too(family: str, results) -> None:
    assert results[f"{family}_plain"][0] <= 1e-3


class Sine(MyGPT2GatedMLP):
    """An edit by a subclass: another formula, which mixes no tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.sin(self.gate_proj(x)) * self.up_proj(x))


class Shifted(MyGPT2GatedMLP):
    """Reads the token before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.down_proj(self.act_fn(self.gate_proj(before)) * self.up_proj(x))


def sine(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(torch.sin(mlp.gate_proj(x)) * mlp.up_proj(x))


def shifted(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
    gate = mlp.act_fn(torch.nn.functional.linear(before, mlp.gate_proj.weight, mlp.gate_proj.bias))
    return mlp.down_proj(gate * mlp.up_proj(x))


@pytest.mark.parametrize(("edited", "formula"), [(Sine, sine), (Shifted, shifted)])
def test_a_subclass_computes_its_own_formula(edited: type, formula) -> None:
    config = mygpt2_config(mlp_type="gated", activation_function="silu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = MyGPT2ForCausalLM(config)
    for layer in model.model.layers:
        mlp = edited(config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp
    inputs = batch("left", rows=4)
    inputs |= {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), "use_cache": False}

    def measure() -> list[torch.Tensor]:
        model.zero_grad()
        output = model.train()(**inputs, skip_padding=True)
        output.loss.backward()
        with torch.no_grad():
            states = model.eval().model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state
        rows = inputs["attention_mask"].bool()
        return [output.loss.detach(), states[rows], *(p.grad.clone() for p in model.parameters())]

    found = measure()
    for layer in model.model.layers:  # the formula written out, by another route: padded, since it replaces `forward`
        layer.mlp.forward = lambda x, mlp=layer.mlp: formula(mlp, x)
    with torch.backends.mkldnn.flags(enabled=False):
        expected = measure()
    for mine, theirs in zip(found, expected):
        assert largest_difference(mine, theirs) <= 1e-4


def test_the_stacks_as_they_stand_are_known() -> None:
    """After an edit here, write the new digests into `STACKS`, or padding is computed."""
    for kind, method in ((MyGPT2Model, "forward"), (MyBertModel, "encode")):
        stack = inspect.unwrap(getattr(kind, method))
        methods = [tokenwise._own_method(kind, name) for name in tokenwise._self_calls(stack)]
        assert {tokenwise.digest(function) for function in (stack, *filter(None, methods))} <= tokenwise.STACKS
