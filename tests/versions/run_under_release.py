"""Run by `test_versions.py` as a script, under one transformers release: load folders and compare with golden outputs.

    python -I run_under_release.py RELEASE_FOLDER WORK_FOLDER MODE …

Mode `remote` blocks mymodels and goes by `trust_remote_code`, `package` imports mymodels and needs no trust. Each runs in
a fork of the process that has imported the libraries; any failed assertion ends it with its traceback.
"""

import json
import os
import sys
from pathlib import Path

release, work, modes = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
sys.path.insert(0, release)

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import GenerationMixin, PreTrainedModel  # noqa: E402, F401  the lazy part of the import

assert transformers.__file__.startswith(release), transformers.__file__
for mode in modes:  # noqa: B007  used below, in the fork
    forked = os.fork()
    if not forked:
        break
    os.waitpid(forked, 0)
else:
    sys.exit()
if mode == "remote":
    sys.modules["mymodels"] = None
TRUST = {"trust_remote_code": True} if mode == "remote" else {}
if mode == "package":
    import mymodels


def load(auto_class: str, folder: Path, **how):
    model, loading = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True, **TRUST, **how)
    home = "transformers_modules" if mode == "remote" else "mymodels"
    assert type(model).__module__.startswith(home), type(model)
    return model.eval(), {name: sorted(map(str, keys)) for name, keys in loading.items()}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, difference


def same_weights_as_in_files(model, folder: Path) -> None:
    tensors = model.state_dict()
    for shard in folder.glob("model*.safetensors"):
        for name, tensor in load_file(shard).items():
            assert torch.equal(tensors[name], tensor), name


def gradients(model, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_folder(folder: Path, auto_class: str, new_head: tuple[str, set[str]]) -> None:
    golden = load_file(folder.with_suffix(".safetensors"))
    batch = {name: golden[name] for name in ("input_ids", "attention_mask")}
    shown = batch["attention_mask"].bool() if golden["logits"].ndim == 3 else ...

    # load: nothing missing, unexpected or re-initialised; same numbers, here and placed by accelerate
    model, loading = load(auto_class, folder)
    assert not any(loading.values()), loading
    same_weights_as_in_files(model, folder)
    config = json.loads((folder / "config.json").read_text())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None:
        assert (head.weight is embeddings.weight) == config.get("tie_word_embeddings", True)
    with torch.no_grad():
        close(model(**batch).logits[shown], golden["logits"][shown])
        placed, _ = load(auto_class, folder, device_map="auto")
        close(placed(**batch).logits[shown], golden["logits"][shown])

        # attention: eager is sdpa, and the switch really switches
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        outputs = model(**batch, output_attentions=True)
        size = golden["logits"][shown].abs().max().item()  # another order of sums: relative to the largest logit
        close(outputs.logits[shown], golden["logits"][shown], tolerance=1e-5 * max(size, 1))
        assert len(outputs.attentions) == config["num_hidden_layers"]
        model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "sdpa"

    # greedy tokens, whatever the cache
    if "greedy" in golden:
        for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            tokens = model.generate(
                **batch, do_sample=False, max_new_tokens=golden["greedy"].shape[1] - batch["input_ids"].shape[1], **how
            )
            assert torch.equal(tokens, golden["greedy"]), how

    # save and reload, code and map included
    again = work / f"{folder.name}-again-{mode}"
    model.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["auto_map"] == config["auto_map"]
    for code in folder.glob("*.py"):
        assert (again / code.name).read_bytes() == code.read_bytes()
    reloaded, loading = load(auto_class, again)
    assert not any(loading.values()), loading
    same_weights_as_in_files(reloaded, folder)

    # another class on the same folder: its new tensors start well, and no loaded one is touched
    other, missing = new_head
    model, loading = load(other, folder)
    assert set(loading["missing_keys"]) == missing, loading
    loaded = model.state_dict()
    for shard in folder.glob("model*.safetensors"):
        for name, tensor in load_file(shard).items():
            if name in loaded and name not in missing:
                assert torch.equal(loaded[name], tensor), name
    for name in missing:
        assert loaded[name].isfinite().all()
        if name.endswith("bias"):
            assert not loaded[name].any(), name
        elif "LayerNorm" in name:
            assert (loaded[name] == 1).all(), name
        else:
            assert 0.5 < loaded[name].std() / config["initializer_range"] < 1.5, (name, loaded[name].std())

    # train: gradients, with checkpointing too; resize
    model, _ = load(auto_class, folder)
    labels = (
        batch["input_ids"] if golden["logits"].ndim == 3 else torch.zeros(len(batch["input_ids"]), dtype=torch.long)
    )
    batch["labels"] = labels
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout",):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    for name, gradient in gradients(model, batch).items():
        close(gradient, expected[name], tolerance=1e-5 * max(expected[name].abs().max().item(), 1))
    model.eval()
    model.resize_token_embeddings(config["vocab_size"] + 5)
    with torch.no_grad():
        assert model.config.vocab_size == config["vocab_size"] + 5
        logits = model(input_ids=golden["input_ids"], attention_mask=golden["attention_mask"]).logits
        close(logits[..., : golden["logits"].shape[-1]][shown], golden["logits"][shown])


def check_int8(folder: Path, auto_class: str, other: str) -> None:
    """An int8 folder gives the recorded numbers, is saved and loaded again, in bfloat16, as float, and with another head."""
    golden = load_file(folder.with_suffix(".safetensors"))
    batch = {name: golden[name] for name in ("input_ids", "attention_mask")}
    model, loading = load(auto_class, folder)
    assert not any(loading.values()), loading
    same_weights_as_in_files(model, folder)
    int8 = {name for name, tensor in model.state_dict().items() if tensor.dtype is torch.int8}
    assert len(int8) > 8
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None:
        assert (head.weight is embeddings.weight) == model.config.tie_word_embeddings
    with torch.no_grad():
        logits = model(**batch).logits
        close(logits, golden["logits"], tolerance=1e-4)  # a state may be rounded to another step
        model.save_pretrained(work / f"{folder.name}-again-{mode}", max_shard_size="20KB")
        again, loading = load(auto_class, work / f"{folder.name}-again-{mode}")
        assert not any(loading.values()), loading
        close(again(**batch).logits, logits, tolerance=0.0)
        placed, _ = load(auto_class, folder, device_map="auto")
        close(placed(**batch).logits, logits, tolerance=0.0)
        half, _ = load(auto_class, folder, dtype=torch.bfloat16)
        assert half.dtype is torch.bfloat16
        for name, tensor in half.state_dict().items():
            assert tensor.dtype is (torch.int8 if name in int8 else torch.bfloat16), name
            assert name not in int8 or torch.equal(tensor, model.state_dict()[name]), name
        close(half(**batch).logits, logits, tolerance=0.1 * logits.abs().max().item())
    different, loading = load(other, folder)
    for name in loading["missing_keys"]:
        new = different.state_dict()[name]
        assert new.dtype is torch.float32 and new.isfinite().all() and new.std() < 1, name
    assert loading["missing_keys"], loading
    assert type(different.base_model.get_input_embeddings()) is type(embeddings)
    different, _ = load(other, folder, dtype=torch.bfloat16)
    floating = {name for name, tensor in different.state_dict().items() if tensor.is_floating_point()}
    assert {different.state_dict()[name].dtype for name in floating} == {torch.bfloat16}
    with torch.no_grad():
        close(again.dequantize()(**batch).logits, logits, tolerance=0.02 * logits.abs().max().item())
    assert not any(tensor.dtype is torch.int8 for tensor in again.state_dict().values())


def check_tied_head(folder: Path) -> None:
    """A folder of 8 bits without the tied head, which is in int8 too: nothing of it is memory that was not written."""
    model, loading = load("AutoModelForMaskedLM", folder)
    head = model.get_output_embeddings()
    assert head.weight is model.get_input_embeddings().weight and head.weight.dtype is torch.int8
    assert head.outliers is None or (head.outliers == -1).all(), head.outliers
    assert "cls.predictions.transform.dense.weight" in loading["missing_keys"], loading
    with torch.no_grad():
        assert model(torch.arange(2, 20)[None]).logits.isfinite().all()
    try:
        load("AutoModelForMaskedLM", folder, vocab_size=120)
    except (RuntimeError, ValueError) as error:
        assert "shape" in str(error) or "size" in str(error), error
    else:
        raise AssertionError("sizes that differ were not noticed")


def check_other_sizes(folder: Path) -> None:
    """An int8 head of 40 labels, loaded with 50: new weights, or, from 5.0 to 5.10, an error."""
    how = {"num_labels": 50, "ignore_mismatched_sizes": True}
    try:
        model, loading = load("AutoModelForSequenceClassification", folder, **how)
    except ValueError as error:
        number = tuple(int(part) for part in transformers.__version__.split(".")[:2])
        assert "shape" in str(error) and (5, 0) <= number <= (5, 10), error
    else:
        assert len(loading["mismatched_keys"]) == 2, loading
        assert type(model.classifier) is torch.nn.Linear and model.classifier.weight.std() < 1
        assert model.classifier.bias.abs().max() < 1
        with torch.no_grad():
            assert model(torch.arange(2, 20)[None]).logits.isfinite().all()


def check_bias_of_a_block() -> None:
    """A bias that the files lack is what the class of the block around makes it."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.nn.Linear(32, 64)

    class Gated(PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.block = Block()
            self.post_init()

        def _init_weights(self, module):
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.zeros_(module.bias)
            if isinstance(module, Block):
                torch.nn.init.constant_(module.gate.bias, 1.0)

        def get_input_embeddings(self):
            raise NotImplementedError

    found = []
    for kind in ("float", "int8"):
        model = Gated(transformers.LlamaConfig())
        model = model if kind == "float" else mymodels.quantize(model.eval(), activation_bits=16)
        model.save_pretrained(work / f"gated-{kind}")
        file = work / f"gated-{kind}" / "model.safetensors"
        tensors = load_file(file)
        del tensors["block.gate.bias"]
        save_file(tensors, file, metadata={"format": "pt"})
        found.append(Gated.from_pretrained(file.parent).block.gate.bias)
    assert torch.equal(*found), found


def check_stock_int8() -> None:
    """In the package only: stock models in int8, from a float folder too."""
    config = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    stock = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)),
        transformers.BertForMaskedLM(transformers.BertConfig(**shape)),
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
    )
    ids = torch.randint(1, 97, (2, 9))
    for model in stock:
        folder = work / f"float-{type(model).__name__}"
        model.eval().save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, quantization_config=mymodels.Int8Config())
        mymodels.quantize(model).save_pretrained(folder.with_name(f"eight-{type(model).__name__}"))
        again = type(model).from_pretrained(folder.with_name(f"eight-{type(model).__name__}"))
        with torch.no_grad():
            close(again(ids).logits, model(ids).logits, tolerance=0.0)
            close(loaded(ids).logits, model(ids).logits, tolerance=0.0)
    shape = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5 = transformers.T5Model(transformers.T5Config(**shape, tie_word_embeddings=False))
    mymodels.quantize(t5.eval(), activation_bits=8).save_pretrained(work / "eight-t5")
    head = transformers.T5ForConditionalGeneration.from_pretrained(work / "eight-t5")  # tied from 5.0
    with torch.no_grad():
        assert 1e-3 < head(input_ids=ids, decoder_input_ids=ids).logits.abs().max() < 1e3
    # a parameter that stays in float32 whatever the dtype of the model
    shape = {"vocab_size": 97, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "intermediate_size": 64}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**shape)).eval()
    mamba.save_pretrained(work / "float-mamba")
    mymodels.quantize(mamba).save_pretrained(work / "eight-mamba")
    plain, model = (
        type(mamba).from_pretrained(work / f"{kind}-mamba", dtype=torch.bfloat16).state_dict()
        for kind in ("float", "eight")
    )
    for name, tensor in model.items():
        if tensor.dtype is not torch.int8:
            assert tensor.dtype is plain[name].dtype and torch.equal(tensor, plain[name]), name
    check_bias_of_a_block()


def check_new_weights(folder: Path, auto_class: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder, **TRUST)
    config.num_hidden_layers, config.layer_types, config.sliding_window = 2, ["full_attention"] * 2, None
    config.hidden_size = config.intermediate_size = 256
    model = getattr(transformers, auto_class).from_config(config, **TRUST)
    block = model.base_model.layers[0]
    for linear, share in ((block.self_attn.q_proj, 1), (block.self_attn.o_proj, 0.5), (block.mlp.down_proj, 0.5)):
        assert 0.9 < linear.weight.std() / (config.initializer_range * share) < 1.1  # 0.5: 1/√(2 × 2 layers)


def check_stock_bert(my_bert: type) -> None:
    stock = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    ).eval()
    stock.save_pretrained(work / f"stock-bert-{mode}")
    mine, loading = my_bert.from_pretrained(work / f"stock-bert-{mode}", output_loading_info=True)
    assert not any(loading.values()), loading
    ids, mask = torch.randint(1, 97, (2, 9)), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    with torch.no_grad():
        close(mine(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits)
        # outputs have the same items in the same places, as a dict and as a tuple
        for more in ({}, {"output_hidden_states": True}):
            found, expected = (model.base_model(ids, attention_mask=mask, **more) for model in (mine, stock))
            assert list(found) == list(expected), list(found)
            close(found["pooler_output"], expected["pooler_output"])
            as_tuples = [
                model.base_model(ids, attention_mask=mask, return_dict=False, **more) for model in (mine, stock)
            ]
            assert len(as_tuples[0]) == len(as_tuples[1])
            close(as_tuples[0][1], as_tuples[1][1])


def check_stock_gpt2() -> None:
    """In the package only: a stock folder loads as it is, places included, and `warm_start` fits it to another shape."""
    stock = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()
    stock.save_pretrained(work / "stock-gpt2")
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        expected = stock(ids).logits
        for how in ({}, {"device_map": "auto"}, {"attn_implementation": "eager"}):
            mine, loading = mymodels.MyGPT2ForCausalLM.from_pretrained(
                work / "stock-gpt2", output_loading_info=True, **how
            )
            assert not any(loading.values()), loading
            close(mine(ids).logits, expected)
        exact = {"norm_type": "rmsnorm", "tie_word_embeddings": False, "lm_head_bias": True, "num_hidden_layers": 3}
        report = mymodels.warm_start("mygpt2", work / "stock-gpt2", overrides={**exact, "intermediate_size": 200})
        assert report.is_exact, report
        close(report.model(ids).logits, expected, tolerance=1e-4)
        report.save_pretrained(work / "warm")
        again, loading = mymodels.MyGPT2ForCausalLM.from_pretrained(work / "warm", output_loading_info=True)
        assert not any(loading.values()), loading
        close(again(ids).logits, expected, tolerance=1e-4)
        pooled = mymodels.MyGPT2ForCausalLM.from_pretrained(work / "stock-gpt2", num_key_value_heads=2)
        assert all(p.isfinite().all() and p.std() < 2 for p in pooled.parameters() if p.ndim > 1)


torch.manual_seed(0)
if mode == "package":
    check_stock_gpt2()
    check_stock_int8()
for folder in sorted(work.glob("mygpt2-*/config.json")):
    folder = folder.parent
    if "-again-" not in folder.name:
        check_folder(folder, "AutoModelForCausalLM", ("AutoModelForSequenceClassification", {"score.weight"}))
        check_new_weights(folder, "AutoModelForCausalLM")
check_folder(
    work / "mybert-classifier",
    "AutoModelForSequenceClassification",
    ("AutoModelForTokenClassification", set()),
)
check_folder(
    work / "mybert-masked",
    "AutoModelForMaskedLM",
    (
        "AutoModelForSequenceClassification",
        {"classifier.weight", "classifier.bias", "bert.pooler.score.weight", "bert.pooler.score.bias"},
    ),
)
check_int8(work / "int8-mygpt2", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
check_int8(work / "int8-everything", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
check_int8(work / "int8-mybert", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")
for name in ("headless-base", "headless-classifier"):
    check_tied_head(work / name)
check_other_sizes(work / "eight-labels")
check_stock_bert(type(load("AutoModelForSequenceClassification", work / "mybert-classifier")[0]))
tokenizer = transformers.AutoTokenizer.from_pretrained(work / "mygpt2-demo", **TRUST)
expected = json.loads((work / "tokens.json").read_text())
assert tokenizer(expected["text"]).input_ids == expected["input_ids"]
print("transformers", transformers.__version__, mode, "ok")
