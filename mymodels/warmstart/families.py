"""How each family of checkpoints names its tensors and config fields, as tables.

Names are mapped to *our* names, those of `MyGPT2For…` and `MyBertFor…` with the base model's prefix. In a table, `*` is
a layer's number; `{a,b,c}` on our side means that the tensor holds several of ours, stacked along the output; a pattern
without a parameter's name applies to all parameters of a module.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .lazy_tensor import Why


class Family(NamedTuple):
    """One kind of checkpoint."""

    name: str
    target: str  # our model type that has its architecture
    model_types: tuple[str, ...]  # its values of `model_type` in `config.json`
    anchor: str  # regex of a tensor's name that identifies the family
    prefix: str  # of the base model in checkpoints with a head
    names: tuple[tuple[str, str], ...]  # theirs → ours; if several give the same name, the first is used
    parameters: Mapping[str, str] = {
        "weight": "weight",
        "bias": "bias",
    }  # last part of a parameter's name: theirs → ours
    transposed: str = "$^"  # regex of names whose matrices are stored [in, out]
    fields: Mapping[str, str] = {}  # config fields named otherwise: theirs → ours
    implied: Mapping[str, Any] = {}  # config fields that are fixed in its code
    constants: str = "$^"  # regex of tensors that are not weights: masks, position ids
    not_used: Mapping[str, Why] = {}  # regex → why our model has no such tensor
    zeros: tuple[str, ...] = ()  # parameters of ours that it does not have, and that are set to 0
    positions_after_padding: bool = False  # the table's first position is row `pad_token_id + 1`


BERT_ANCHOR = r"encoder\.layer\.0\.attention\.self\.query\.weight"
_OPTIMIZER = Why("it belongs to the optimizer", "exact", constant=True)
_LAYER = "bert.encoder.layer.*"
_BERT_LAYER = (
    ("attention.self.query", "attention.self.query"),
    ("attention.self.key", "attention.self.key"),
    ("attention.self.value", "attention.self.value"),
    ("attention.output.dense", "attention.output.dense"),
    ("attention.output.LayerNorm", "attention.output.LayerNorm"),
    ("intermediate.dense", "intermediate.dense"),
    ("output.dense", "output.dense"),
    ("output.LayerNorm", "output.LayerNorm"),
)
_EMBEDDINGS = tuple(
    (f"embeddings.{name}", f"bert.embeddings.{name}")
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
)
_BERT = (*_EMBEDDINGS, *((f"encoder.layer.*.{theirs}", f"{_LAYER}.{ours}") for theirs, ours in _BERT_LAYER))
_HEADS = (("classifier", "classifier"), ("qa_outputs", "qa_outputs"))
_TRANSFORM = "cls.predictions.transform"
_NEXT_SENTENCE = Why("MyBert has no head for the next sentence", "exact")
_BERT_HEADS = (
    ("pooler.dense", "bert.pooler.dense"),
    (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.dense"),
    (f"{_TRANSFORM}.LayerNorm", f"{_TRANSFORM}.LayerNorm"),
    ("cls.predictions.decoder.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.bias"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
_OLD_NORMS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}

FAMILIES = (
    Family(
        name="mygpt2",
        target="mygpt2",
        model_types=("mygpt2",),
        anchor=r"layers\.0\.self_attn\.q_proj\.weight",
        prefix="model",
        names=(
            ("embed_tokens", "model.embed_tokens"),
            ("embed_positions", "model.embed_positions"),
            ("norm", "model.norm"),
            ("lm_head", "lm_head"),
            ("score", "score"),
            *(
                (f"layers.*.{norm}", f"model.layers.*.{norm}")
                for norm in ("input_layernorm", "post_attention_layernorm")
            ),
            *(
                (f"layers.*.self_attn.{part}", f"model.layers.*.self_attn.{part}")
                for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
            ),
            *((f"layers.*.mlp.{part}", f"model.layers.*.mlp.{part}") for part in ("gate_proj", "up_proj", "down_proj")),
        ),
    ),
    Family(
        name="gpt2",
        target="mygpt2",
        model_types=("gpt2",),
        anchor=r"h\.0\.attn\.c_attn\.weight",
        prefix="transformer",
        names=(
            ("wte", "model.embed_tokens"),
            ("wpe", "model.embed_positions"),
            ("h.*.ln_1", "model.layers.*.input_layernorm"),
            ("h.*.attn.c_attn", "model.layers.*.self_attn.{q_proj,k_proj,v_proj}"),
            ("h.*.attn.c_proj", "model.layers.*.self_attn.o_proj"),
            ("h.*.ln_2", "model.layers.*.post_attention_layernorm"),
            ("h.*.mlp.c_fc", "model.layers.*.mlp.up_proj"),
            ("h.*.mlp.c_proj", "model.layers.*.mlp.down_proj"),
            ("ln_f", "model.norm"),
            ("lm_head", "lm_head"),
            ("score", "score"),
        ),
        transposed=r"(c_attn|c_proj|c_fc)\.weight$",
        constants=r"h\.\d+\.attn\.(bias|masked_bias)$",
        not_used={r"multiple_choice_head\.": Why("MyGPT2 has no head for multiple choice", "exact")},
    ),
    Family(
        name="gpt2 (TensorFlow)",
        target="mygpt2",
        model_types=(),
        anchor=r"h0\.attn\.c_attn\.w",
        prefix="model",
        names=(
            ("wte", "model.embed_tokens.weight"),
            ("wpe", "model.embed_positions.weight"),
            ("h*.ln_1", "model.layers.*.input_layernorm"),
            ("h*.attn.c_attn", "model.layers.*.self_attn.{q_proj,k_proj,v_proj}"),
            ("h*.attn.c_proj", "model.layers.*.self_attn.o_proj"),
            ("h*.ln_2", "model.layers.*.post_attention_layernorm"),
            ("h*.mlp.c_fc", "model.layers.*.mlp.up_proj"),
            ("h*.mlp.c_proj", "model.layers.*.mlp.down_proj"),
            ("ln_f", "model.norm"),
        ),
        parameters={"w": "weight", "g": "weight", "b": "bias"},
        transposed=r"\.w$",
        not_used={r"(^|\.)(Adam(_1)?|adam_[mv]|beta\d_power|global_step)$": _OPTIMIZER},
    ),
    Family(
        name="mybert",
        target="mybert",
        model_types=("mybert",),
        anchor=BERT_ANCHOR,
        prefix="bert",
        names=(
            *_BERT,
            *_BERT_HEADS,
            *_HEADS,
            ("pooler.score", "bert.pooler.score"),
            ("layer_mix.weights", "bert.layer_mix.weights"),
        ),
    ),
    Family(
        name="roberta",
        target="mybert",
        model_types=("roberta", "xlm-roberta", "camembert"),
        anchor=BERT_ANCHOR,
        prefix="roberta",
        names=(
            *_BERT,
            ("classifier.dense", "bert.pooler.dense"),  # the first layer of its classifier is BERT's pooler
            ("classifier.out_proj", "classifier"),
            ("pooler.dense", "bert.pooler.dense"),
            ("lm_head.dense", f"{_TRANSFORM}.dense"),
            ("lm_head.layer_norm", f"{_TRANSFORM}.LayerNorm"),
            ("lm_head.decoder.weight", "cls.predictions.decoder.weight"),
            ("lm_head.bias", "cls.predictions.bias"),
            ("lm_head.decoder.bias", "cls.predictions.bias"),
            *_HEADS,
        ),
        implied={"layer_norm_eps": 1e-5, "pad_token_id": 1},
        constants=r"embeddings\.(position_ids|token_type_ids)$",
        positions_after_padding=True,  # padding has no positions, so left padding differs from MyBert
    ),
    Family(
        name="distilbert",
        target="mybert",
        model_types=("distilbert",),
        anchor=r"transformer\.layer\.0\.attention\.q_lin\.weight",
        prefix="distilbert",
        names=(
            *_EMBEDDINGS,
            ("transformer.layer.*.attention.q_lin", f"{_LAYER}.attention.self.query"),
            ("transformer.layer.*.attention.k_lin", f"{_LAYER}.attention.self.key"),
            ("transformer.layer.*.attention.v_lin", f"{_LAYER}.attention.self.value"),
            ("transformer.layer.*.attention.out_lin", f"{_LAYER}.attention.output.dense"),
            ("transformer.layer.*.sa_layer_norm", f"{_LAYER}.attention.output.LayerNorm"),
            ("transformer.layer.*.ffn.lin1", f"{_LAYER}.intermediate.dense"),
            ("transformer.layer.*.ffn.lin2", f"{_LAYER}.output.dense"),
            ("transformer.layer.*.output_layer_norm", f"{_LAYER}.output.LayerNorm"),
            ("vocab_transform", f"{_TRANSFORM}.dense"),
            ("vocab_layer_norm", f"{_TRANSFORM}.LayerNorm"),
            ("vocab_projector.weight", "cls.predictions.decoder.weight"),
            ("vocab_projector.bias", "cls.predictions.bias"),
            *_HEADS,
        ),
        fields={
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "hidden_dim": "intermediate_size",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "seq_classif_dropout": "classifier_dropout",
        },
        implied={"layer_norm_eps": 1e-12},
        constants=r"embeddings\.position_ids$",
        not_used={r"^pre_classifier\.": Why("it is followed by ReLU, MyBert's pooler by tanh")},
        zeros=("bert.embeddings.token_type_embeddings.weight",),
    ),
    Family(
        name="bert (TensorFlow)",
        target="mybert",
        model_types=(),
        anchor=r"encoder\.layer_0\.attention\.self\.query\.kernel",
        prefix="bert",
        names=(
            *((f"embeddings.{n}", f"bert.embeddings.{n}.weight") for n in ("word_embeddings", "position_embeddings")),
            ("embeddings.token_type_embeddings", "bert.embeddings.token_type_embeddings.weight"),
            ("embeddings.LayerNorm", "bert.embeddings.LayerNorm"),
            *((f"encoder.layer_*.{theirs}", f"{_LAYER}.{ours}") for theirs, ours in _BERT_LAYER),
            ("pooler.dense", "bert.pooler.dense"),
            (f"{_TRANSFORM}.dense", f"{_TRANSFORM}.dense"),
            (f"{_TRANSFORM}.LayerNorm", f"{_TRANSFORM}.LayerNorm"),
            ("cls.predictions.output_bias", "cls.predictions.bias"),
            ("output_weights", "classifier.weight"),
            ("output_bias", "classifier.bias"),
            ("cls.squad.output_weights", "qa_outputs.weight"),
            ("cls.squad.output_bias", "qa_outputs.bias"),
        ),
        parameters={"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"},
        transposed=r"\.kernel$",
        not_used={
            r"(^|\.)(adam_[mv]|beta\d_power|global_step)$": _OPTIMIZER,
            r"^cls\.seq_relationship\.": _NEXT_SENTENCE,
        },
    ),
    Family(
        name="bert",
        target="mybert",
        model_types=("bert",),
        anchor=BERT_ANCHOR,
        prefix="bert",
        names=(*_BERT, *_BERT_HEADS, *_HEADS),
        parameters=_OLD_NORMS,
        constants=r"embeddings\.position_ids$",
        not_used={r"^cls\.seq_relationship\.": _NEXT_SENTENCE},
    ),
)
