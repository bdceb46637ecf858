"""`quantize`: whole models against float64 ones with rounded weights, and against what is saved and loaded."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm_python
from safetensors.torch import load_file, save_file
from tiny import SWITCHES, batch, mybert_config, mygpt2_config, stock_bert_config, stock_gpt2_config
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import mymodels
from mymodels import (
    MyBertForMaskedLM,
    MyBertForQuestionAnswering,
    MyBertForSequenceClassification,
    MyBertForTokenClassification,
    MyBertModel,
    MyGPT2ForCausalLM,
    MyGPT2ForSequenceClassification,
    MyGPT2Model,
)
from mymodels.models.int8 import Int8Config
from mymodels.models.int8_layers import LEAST, Int8Embedding, Int8Linear, Int8Weight


def llama(**changes) -> LlamaForCausalLM:
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **changes)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        f"mygpt2 {name}": lambda s=switches: MyGPT2ForCausalLM(mygpt2_config(**s))
        for name, switches in SWITCHES.items()
    },
    "mygpt2 classifier": lambda: MyGPT2ForSequenceClassification(mygpt2_config()),
    "mygpt2 base": lambda: MyGPT2Model(mygpt2_config()),
    **{
        f"mybert {pooling}": lambda p=pooling: MyBertForSequenceClassification(mybert_config(pooling=p))
        for pooling in ("cls", "mean", "max", "attention")
    },
    "mybert mix": lambda: MyBertForSequenceClassification(mybert_config(layer_mix=2)),
    "mybert masked": lambda: MyBertForMaskedLM(mybert_config()),
    "mybert untied": lambda: MyBertForMaskedLM(mybert_config(tie_word_embeddings=False)),
    "mybert tokens": lambda: MyBertForTokenClassification(mybert_config()),
    "mybert spans": lambda: MyBertForQuestionAnswering(mybert_config()),
    "mybert base": lambda: MyBertModel(mybert_config()),
    "gpt2": lambda: GPT2LMHeadModel(stock_gpt2_config()),
    "bert": lambda: BertForSequenceClassification(stock_bert_config()),
    "bert masked": lambda: BertForMaskedLM(stock_bert_config()),
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
}
FEW = ("mygpt2 stock", "mygpt2 everything", "mybert cls", "mybert masked", "gpt2", "bert masked", "llama", "llama tied")


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with weights rounded as int8 rounds them."""
    model, done = copy.deepcopy(model), set()
    for module in model.modules():
        is_linear = type(module) in (nn.Linear, Conv1D) and min(module.weight.shape) >= LEAST
        if (is_linear or module is model.get_input_embeddings()) and id(module.weight) not in done:
            weight = module.weight.t() if type(module) is Conv1D else module.weight
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((torch.round(weight / scale) * scale).nan_to_num())
            done.add(id(module.weight))
    assert done
    return model.double()


@torch.no_grad()
def outputs(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
    found = model(**inputs)
    return torch.cat([t.flatten() for t in found.values() if isinstance(t, torch.Tensor)]).double()


def same_layout(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    def layout(model: PreTrainedModel) -> dict:
        return {name: (type(module), getattr(module, "dtype", None)) for name, module in model.named_modules()}

    return {n: k for n, k in layout(one).items() if n} == {n: k for n, k in layout(other).items() if n}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_one_with_rounded_weights_and_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = made(name)
    inputs = batch("right")
    if name == "mygpt2 base" or not hasattr(model.config, "pad_token_id"):
        inputs = batch()
    truth = outputs(rounded(model), inputs)
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    assert mymodels.quantize(model, activation_bits=16) is model
    assert any(isinstance(module, Int8Linear) for module in model.modules())
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found = outputs(model, inputs)
    assert (found - truth).abs().max() <= 2e-3 * truth.abs().max()

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same_layout(model, again) and not again.training
    assert torch.equal(outputs(again, inputs), found)
    if tied:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    if name not in FEW:
        return
    eight = mymodels.quantize(made(name), activation_bits=8)
    assert (outputs(eight, inputs) - truth).abs().max() <= 0.2 * truth.abs().max()
    assert not torch.equal(outputs(eight, inputs), found)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again"), inputs), found)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype is torch.bfloat16 and same_layout(loaded, model.to(torch.bfloat16))
    for (key, one), two in zip(loaded.named_parameters(), again.parameters(), strict=True):
        assert one.dtype is (torch.int8 if two.dtype is torch.int8 else torch.bfloat16), key
        assert two.dtype is not torch.int8 or torch.equal(one, two)  # scales lose nothing


@pytest.mark.parametrize("name", ["gpt2", "mygpt2 stock", "mybert masked", "llama"])
def test_a_float_folder_is_loaded_in_int8(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=Int8Config())
    assert loaded.config.quantization_config.activation_bits == (8 if "bert" in name else 16)
    inputs = batch()
    assert torch.equal(outputs(loaded, inputs), outputs(mymodels.quantize(model), inputs))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again"), inputs), outputs(model, inputs))


def test_generation_with_a_cache_is_that_without_one() -> None:
    model = mymodels.quantize(made("mygpt2 modern"))
    inputs = batch("left")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    for how in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=12, **how), tokens)


@pytest.mark.parametrize("name", ["mygpt2 stock", "mybert mean", "llama"])
def test_a_row_does_not_depend_on_its_batch_or_padding(name: str) -> None:
    model = mymodels.quantize(made(name), activation_bits=8)
    inputs = batch("right")
    with torch.no_grad():
        found = model(**inputs)[0]
        for row in range(3):
            length = int(inputs["attention_mask"][row].sum())
            alone = model(input_ids=inputs["input_ids"][row : row + 1, :length])[0][0]
            expected = found[row, :length] if found.ndim == 3 else found[row]
            # attention sums in another order, which may move a state over the border between two steps
            torch.testing.assert_close(alone, expected, rtol=1e-3, atol=5e-2)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["mygpt2 stock", "mybert masked", "bert masked"])
def test_a_folder_is_loaded_with_other_heads(name: str, bits: int, tmp_path: Path) -> None:
    model = mymodels.quantize(made(name), activation_bits=bits)
    model.save_pretrained(tmp_path / "head")
    model.base_model.config.architectures = [type(model.base_model).__name__]
    model.base_model.save_pretrained(tmp_path / "base")
    inputs = batch()
    states = outputs(model.base_model, inputs)[: 3 * 11 * 32]
    for folder in ("head", "base"):
        base = AutoModel.from_pretrained(tmp_path / folder)
        assert torch.equal(outputs(base, inputs)[: 3 * 11 * 32], states)
        other, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / folder, num_labels=LEAST, output_loading_info=True
        )
        new = other.score if hasattr(other, "score") else other.classifier
        assert type(new) is nn.Linear and new.weight.dtype is torch.float32  # initialised by transformers
        assert 0.5 < new.weight.std() / other.config.initializer_range < 1.5
        assert any(name.endswith(("score.weight", "classifier.weight")) for name in info["missing_keys"])
        assert torch.equal(outputs(other.base_model, inputs)[: 3 * 11 * 32], states)
    auto = AutoModelForCausalLM if "gpt2" in name else AutoModelForMaskedLM
    again = auto.from_pretrained(tmp_path / "base")
    head = again.get_output_embeddings()
    assert head.weight is again.get_input_embeddings().weight and isinstance(head, Int8Linear)
    assert head.outliers is None if bits == 16 else (head.outliers == -1).all()
    # the folder of another head names no such module
    mymodels.quantize(AutoModelForSequenceClassification.from_config(made(name).config)).save_pretrained(tmp_path / "o")
    head = auto.from_pretrained(tmp_path / "o").get_output_embeddings()
    assert isinstance(head, Int8Linear) and head.outliers is None
    if "gpt2" in name:
        assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_excluded_modules_stay_in_float(tmp_path: Path) -> None:
    excluded = ["lm_head", "layers.1", "o_proj", "model.layers.2.mlp.up_proj"]
    model = mymodels.quantize(made("mygpt2 stock"), modules_to_not_convert=excluded)
    modules = dict(model.named_modules())
    for name in ("model.embed_tokens", "lm_head"):  # tied
        assert not isinstance(modules[name], Int8Weight)
    left = {name for name, module in modules.items() if type(module) is nn.Linear}
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    expected = {f"model.layers.1.{part}" for part in parts} | {f"model.layers.{n}.self_attn.o_proj" for n in (0, 2)}
    assert left == expected | {"model.layers.2.mlp.up_proj", "lm_head"}
    model.save_pretrained(tmp_path)
    again, info = MyGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same_layout(model, again)
    inputs = batch()
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    assert AutoModel.from_pretrained(tmp_path).layers[1].mlp.up_proj.weight.dtype is torch.float32


@pytest.mark.parametrize("change", ["hook", "forward", "weight_norm"])
def test_what_a_layer_does_besides_its_product_is_kept(change: str) -> None:
    model = made("mygpt2 stock")
    layer = model.model.layers[1].mlp.up_proj
    if change == "hook":
        layer.register_forward_hook(lambda module, args, output: 3 * output)
    elif change == "forward":
        original = layer.forward
        layer.forward = lambda states: 3 * original(states)
    else:
        nn.utils.weight_norm(layer)
        with torch.no_grad():
            layer.weight_g.mul_(3)  # the weight is computed at the next call
    inputs = batch()
    truth = outputs(model, inputs)
    mymodels.quantize(model)
    assert model.model.layers[1].mlp.up_proj is layer and type(model.model.layers[0].mlp.up_proj) is Int8Linear
    assert (outputs(model, inputs) - truth).norm() < 0.1 * truth.norm()


class Nested(PreTrainedModel):
    """Names that patterns could confuse, and one module under two names."""

    config_class = LlamaConfig
    _tied_weights_keys = {f"shared.{name}": f"layers.0.dense.{name}" for name in ("weight", "bias")}

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(32, 32), "inner": nn.ModuleDict()}) for _ in range(3)
        )
        for layer in self.layers:
            layer["inner"]["dense"] = nn.Linear(32, 32)
        self.shared = self.layers[0]["dense"]
        self.few = nn.Linear(32, LEAST - 1)
        self.post_init()

    def get_input_embeddings(self):
        raise NotImplementedError

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            states = layer["inner"]["dense"](layer["dense"](states))
        return self.few(self.shared(states))


def test_names_are_not_confused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested(LlamaConfig(tie_word_embeddings=True)).eval()
    mymodels.quantize(model, modules_to_not_convert=["inner"], activation_bits=8)  # warns, as it takes no input_ids
    assert isinstance(model.shared, Int8Linear) and model.shared is model.layers[0]["dense"]
    assert type(model.few) is nn.Linear and type(model.layers[0]["inner"]["dense"]) is nn.Linear
    model.save_pretrained(tmp_path)
    again = Nested.from_pretrained(tmp_path).eval()
    assert again.shared is again.layers[0]["dense"] and same_layout(model, again)
    states = torch.randn(2, 32)
    with torch.no_grad():
        assert torch.equal(again(states), model(states))


def test_the_columns_of_the_largest_states_are_found() -> None:
    model = made("mybert mean")
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.weight[9] = 300.0
    model.train()
    truth = outputs(rounded(copy.deepcopy(model).eval()), inputs := batch())
    quantised = mymodels.quantize(copy.deepcopy(model))
    assert quantised.training and not quantised.bert.encoder.layer[0].attention.self.query._forward_pre_hooks
    assert 9 in quantised.bert.encoder.layer[0].attention.self.query.outliers
    found = outputs(quantised.eval(), inputs)
    others = copy.deepcopy(quantised)
    with torch.no_grad():
        for _, module in others.named_modules():
            if isinstance(module, Int8Linear):
                module.outliers.fill_(-1)
    assert (found - truth).abs().max() < 0.3 * (outputs(others, inputs) - truth).abs().max()


def test_copies_and_edits() -> None:
    model = mymodels.quantize(made("mygpt2 stock"))
    inputs = batch()
    before = outputs(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(copied, inputs), before)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight
        with torch.no_grad():
            copied.model.layers[0].mlp.up_proj.weight[:, :-4].neg_()
        assert not torch.equal(outputs(copied, inputs), before)
    other = mymodels.quantize(MyGPT2ForCausalLM(mygpt2_config()).eval())
    for assign in (False, True):
        outputs(model, inputs)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(outputs(model, inputs), outputs(other, inputs))
        other = mymodels.quantize(MyGPT2ForCausalLM(mygpt2_config()).eval())


@pytest.mark.parametrize("name", ["mygpt2 stock", "mybert masked", "gpt2"])
def test_dequantize_returns_to_a_float_model(name: str, tmp_path: Path) -> None:
    model = made(name)
    truth = outputs(rounded(model), inputs := batch())
    mymodels.quantize(model).dequantize()
    assert not any(isinstance(module, Int8Weight) for module in model.modules())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (outputs(model, inputs) - truth).abs().max() < 1e-5 * truth.abs().max()
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and same_layout(made(name), again)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


@pytest.fixture
def filled_memory():
    """New tensors hold NaN, and integers their largest value."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_bias_that_a_folder_lacks_is_initialised(tmp_path: Path, filled_memory: None) -> None:
    mymodels.quantize(made("mygpt2 untied")).save_pretrained(tmp_path / "own")
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.bias"]
    save_file(tensors, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    again, info = MyGPT2ForCausalLM.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.0.mlp.up_proj.bias"}
    assert torch.equal(again.model.layers[0].mlp.up_proj.bias, torch.zeros(128))
    # a head that is tied, and in int8 too, but for its bias
    torch.manual_seed(0)
    base = DistilBertModel(DistilBertConfig(vocab_size=97, dim=32, hidden_dim=64, n_layers=2, n_heads=4)).eval()
    mymodels.quantize(base).save_pretrained(tmp_path / "distil")
    masked = DistilBertForMaskedLM.from_pretrained(tmp_path / "distil")
    assert isinstance(masked.vocab_projector, Int8Linear) and not masked.vocab_projector.bias.any()


def test_what_cannot_be_quantised_is_refused_and_not_changed() -> None:
    model = mymodels.quantize(made("mygpt2 stock"))
    with pytest.raises(ValueError, match="MyGPT2ForCausalLM is quantised already"):
        mymodels.quantize(model)
    with pytest.raises(ValueError, match="Sequential that is no transformers model"):
        mymodels.quantize(nn.Sequential(nn.Linear(64, 64)))
    model = made("mygpt2 stock")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    layout = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        mymodels.quantize(model)
    assert same_layout(model, layout) and not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="no layer that can be quantised"):
        mymodels.quantize(made("mygpt2 stock"), modules_to_not_convert=["model", "lm_head"])
    with torch.device("meta"):
        model = MyGPT2ForCausalLM(mygpt2_config())
    with pytest.raises(ValueError, match="has no data"):
        mymodels.quantize(model)
    with pytest.raises(ValueError, match="activation_bits=4, but it must be 8 or 16"):
        Int8Config(activation_bits=4)
    with pytest.raises(ValueError, match="modules_to_not_convert="):
        Int8Config(modules_to_not_convert="lm_head")


def test_what_a_folder_lacks_is_new_and_reported(tmp_path: Path) -> None:
    model = mymodels.quantize(made("mygpt2 untied"))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = MyGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.layers.0.mlp.up_proj.weight"}
    new = again.model.layers[0].mlp.up_proj
    assert type(new) is nn.Linear and 0.5 < new.weight.std() / again.config.initializer_range < 1.5
    assert torch.equal(new.bias, model.model.layers[0].mlp.up_proj.bias)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 36, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight was not loaded"):
        MyGPT2ForCausalLM.from_pretrained(tmp_path)


WITHOUT = """
import sys
sys.modules["mymodels"] = None
import torch, transformers
for folder in sys.argv[1:]:
    try:
        how = {"trust_remote_code": True} if "mygpt2" in folder else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
        with torch.no_grad():
            logits = model(torch.arange(11)[None]).logits
        print(type(model).__module__.split(".")[0], type(model.model.layers[0].mlp.up_proj).__name__, logits.double().sum().item())
        model.save_pretrained(folder + "-again")
    except Exception as error:
        print("refused", type(error).__name__, 0)
"""


def test_folders_where_mymodels_is_not_there(tmp_path: Path) -> None:
    """Remote code loads them; without, where the method is unknown, int8 numbers never become float weights."""
    models = {name: mymodels.quantize(made(name)) for name in ("gpt2", "llama", "mygpt2 everything")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    command = [sys.executable, "-I", "-c", WITHOUT, *(str(tmp_path / name) for name in models)]
    done = warm_python.run(command, check=True)
    *refused, remote = done.stdout.splitlines()[-3:]
    assert refused == ["refused RuntimeError 0"] * 2
    module, layer, total = remote.split()
    assert (module, layer) == ("transformers_modules", "Int8Linear")
    with torch.no_grad():
        expected = models["mygpt2 everything"](torch.arange(11)[None]).logits
    assert float(total) == expected.double().sum().item()
    again = tmp_path / "mygpt2 everything-again"
    for code in ("int8.py", "int8_layers.py"):
        assert (again / code).read_bytes() == (Path(mymodels.__file__).parent / "models" / code).read_bytes()
    with torch.no_grad():
        assert torch.equal(MyGPT2ForCausalLM.from_pretrained(again)(torch.arange(11)[None]).logits, expected)


def test_a_weight_that_the_code_reads_stays_in_float() -> None:
    """Mamba multiplies with `dt_proj.weight` itself, and casts states to the dtype of `lm_head.weight`."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, state_size=4, time_step_rank=32)
    model = MambaForCausalLM(config).eval()
    ids = torch.randint(97, (2, 6))
    with torch.no_grad():
        expected = model(ids).logits
        smaller = mymodels.quantize(model)
        assert type(smaller.lm_head) is type(smaller.backbone.layers[0].mixer.dt_proj) is nn.Linear
        assert type(smaller.backbone.layers[0].mixer.in_proj) is Int8Linear
        assert (smaller(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()


class ReadsItsWeight(nn.Module):
    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.proj.weight.t()


class CallsIt(nn.Module):
    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.proj(states)


def test_layers_of_one_name_of_which_the_code_reads_one() -> None:
    """The pattern of the converted one must not describe the other."""
    model = llama()
    for layer, kind in zip(model.model.layers, (ReadsItsWeight, CallsIt)):
        layer.self_attn = kind(nn.Linear(32, 32))
    config = mymodels.quantize(model, modules_to_not_convert=["mlp", "lm_head", "embed_tokens"]).config
    assert config.quantization_config.modules == ["model.layers.1.self_attn.proj"]


def test_quantised_in_inference_mode_it_is_as_fast() -> None:
    with torch.inference_mode():
        model = mymodels.quantize(made("mygpt2 stock"))
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert layers and not any(layer.weight.is_inference() for layer in layers)
    inputs, other = batch(), mymodels.quantize(made("mygpt2 stock"))
    assert torch.equal(outputs(model, inputs), outputs(other, inputs))


def test_a_name_of_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="modules_to_not_convert: LlamaForCausalLM has no module mlp_, layer"):
        mymodels.quantize(llama(), modules_to_not_convert=["mlp_", "lm_head", "layer"])
