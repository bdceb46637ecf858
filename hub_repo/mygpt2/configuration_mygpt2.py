"""Configuration of MyGPT2. Copied as it is into Hub repos: imports transformers and its siblings `base` and `compat` only."""

import inspect
from typing import Any

from transformers.activations import ACT2FN
from transformers.utils import logging

from .base import NORMS, MyPretrainedConfig, Plan
from .compat import TP_REPLICATED

logger = logging.get_logger(__name__)


class MyGPT2Config(MyPretrainedConfig):
    """GPT-2 with switches. The defaults are stock GPT-2 (124M) exactly; each modification is one named field.

    GPT-2's old names (`n_embd`, `n_layer`, `n_head`, `n_positions`, `n_inner`) are accepted and readable too.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads per block.
        num_key_value_heads: key/value heads per block, a divisor of `num_attention_heads`; fewer of them is
            grouped-query attention (arXiv 2305.13245), one is multi-query attention (arXiv 1911.02150).
            Default: `num_attention_heads`.
        head_dim: width of one head. Default: `hidden_size // num_attention_heads`.
        intermediate_size: width of the MLP. Default: `4 * hidden_size`.
        max_position_embeddings: rows of the learned position table, which is also the longest input; with `rope` and
            `none` a hint for inference engines, not a limit.
        position_embedding_type: `learned`, `rope` (rotary, arXiv 2104.09864) or `none` (arXiv 2305.19466).
        rope_theta: base of the rotary frequencies.
        norm_type: `layernorm` or `rmsnorm` (arXiv 1910.07467).
        layer_norm_epsilon: added to the variance in either norm.
        mlp_type: `dense` or `gated` (`down(act(gate(x)) * up(x))`, GLU variants, arXiv 2002.05202).
        activation_function: a name from `transformers.activations.ACT2FN`; `silu` with `gated` is SwiGLU.
        qk_norm: normalise queries and keys per head before their product, with `norm_type` (arXiv 2302.05442, after 2010.04245).
        attention_bias, mlp_bias: biases in the attention and MLP projections.
        sliding_window: how many tokens a `sliding_attention` layer sees, itself included (arXiv 2004.05150).
        layer_types: per layer `full_attention` or `sliding_attention`. Default: all sliding if `sliding_window` is
            set, else all full. Where all are full, `sliding_window` has no effect.
        final_logit_softcapping: `c` in `c * tanh(logits / c)` (Gemma 2, arXiv 2408.00118).
        tie_word_embeddings: the head shares the token embeddings' weight.
        lm_head_bias: a bias per token in the language-model head.
        scale_attn_weights, scale_attn_by_inverse_layer_idx: divide scores by `√head_dim`, and by layer number.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout after each sub-layer, after the embeddings, on attention weights.
        initializer_range: standard deviation of new weights.

    Raises:
        ValueError: a field has an impossible value, or two under its old name and its own (a default is taken as not given).
    """

    model_type = "mygpt2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
    }
    AUTO_MAP = {
        "AutoConfig": "configuration_mygpt2.MyGPT2Config",
        "AutoModel": "modeling_mygpt2.MyGPT2Model",
        "AutoModelForCausalLM": "modeling_mygpt2.MyGPT2ForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mygpt2.MyGPT2ForSequenceClassification",
    }
    CHOICES = {
        "position_embedding_type": ("learned", "rope", "none"),
        "norm_type": tuple(NORMS),
        "mlp_type": ("dense", "gated"),
    }

    @Plan
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism splits projections by outputs (`colwise`) or by inputs (`rowwise`)."""
        attention, mlp = "layers.*.self_attn.", "layers.*.mlp."
        plan = {attention + name: "colwise" for name in ("q_proj", "k_proj", "v_proj")}
        if self.qk_norm and TP_REPLICATED:  # each process normalises its own heads with the same weight
            plan |= {attention + name: TP_REPLICATED for name in ("q_norm", "k_norm")}
        plan |= {mlp + name: "colwise" for name in ("gate_proj", "up_proj")[self.mlp_type == "dense" :]}
        return plan | {attention + "o_proj": "rowwise", mlp + "down_proj": "rowwise"}

    @Plan
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:
        """The modules that pipeline parallelism distributes, in order, with the inputs and outputs of each."""
        learned = {"embed_positions": (["position_ids"], ["position_embeds"])}
        return {
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            **(learned if self.position_embedding_type == "learned" else {}),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states", "attentions"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 1024,
        position_embedding_type: str = "learned",
        rope_theta: float = 10000.0,
        norm_type: str = "layernorm",
        layer_norm_epsilon: float = 1e-5,
        mlp_type: str = "dense",
        activation_function: str = "gelu_new",
        qk_norm: bool = False,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        sliding_window: int | None = None,
        layer_types: list[str] | None = None,
        final_logit_softcapping: float | None = None,
        tie_word_embeddings: bool = True,
        lm_head_bias: bool = False,
        scale_attn_weights: bool = True,
        scale_attn_by_inverse_layer_idx: bool = False,
        resid_pdrop: float = 0.1,
        embd_pdrop: float = 0.1,
        attn_pdrop: float = 0.1,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 50256,
        eos_token_id: int | list[int] | None = 50256,
        pad_token_id: int | None = None,
        auto_map: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding_type = position_embedding_type
        self.rope_theta = rope_theta
        self.norm_type = norm_type
        self.layer_norm_epsilon = layer_norm_epsilon
        self.mlp_type = mlp_type
        self.activation_function = activation_function
        self.qk_norm = qk_norm
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.sliding_window = sliding_window
        self.final_logit_softcapping = final_logit_softcapping
        self.lm_head_bias = lm_head_bias
        self.scale_attn_weights = scale_attn_weights
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.resid_pdrop = resid_pdrop
        self.embd_pdrop = embd_pdrop
        self.attn_pdrop = attn_pdrop
        self.initializer_range = initializer_range
        parameters = inspect.signature(MyGPT2Config.__init__).parameters
        for old, name in MyGPT2Config.attribute_map.items():
            value = getattr(self, name)
            if kwargs.get(old, value) != value != parameters[name].default:
                raise ValueError(
                    f"{type(self).__name__}: {old}={kwargs[old]} and {name}={value} name one field: give one of them"
                )

        super().__init__(**kwargs)  # `attribute_map` maps GPT-2's old names to the fields above

        heads = self.num_attention_heads
        self._finish_init(
            auto_map,
            num_key_value_heads=heads if num_key_value_heads is None else num_key_value_heads,
            # max(): `check_consistency` reports zero heads
            head_dim=self.hidden_size // max(heads, 1) if head_dim is None else head_dim,
            intermediate_size=4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size,
            layer_types=None if layer_types is None else list(layer_types),
            tie_word_embeddings=tie_word_embeddings,
            use_cache=use_cache,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )

    _followed_layer_types = None  # the last default; `layer_types` equal to it follow later changes of other fields

    def _default_layer_types(self) -> list[str]:
        return ["full_attention" if self.sliding_window is None else "sliding_attention"] * self.num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if output.pop("_followed_layer_types", None) == output["layer_types"]:
            output["layer_types"] = self._default_layer_types()
        return output

    def check_consistency(self) -> None:
        super().check_consistency()
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads and self.head_dim == self.hidden_size // heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={heads}: change one of them, or set head_dim"
            )
        self._require(kv_heads > 0 and heads % kv_heads == 0, "num_key_value_heads", f"a divisor of {heads} heads")
        self._require_heads_per_process("num_attention_heads", "num_key_value_heads")
        self._require(self.head_dim > 0, "head_dim", "a positive integer")
        if self.position_embedding_type == "rope":
            self._require(self.head_dim % 2 == 0, "head_dim", "even for position_embedding_type='rope'")
            self._require(self.rope_theta > 0, "rope_theta", "positive")
        self._require(self.activation_function in ACT2FN, "activation_function", "a key of transformers' ACT2FN")
        self._require(not getattr(self, "add_cross_attention", False), "add_cross_attention", "False: not supported")
        window, cap = self.sliding_window, self.final_logit_softcapping
        # with 1, transformers' sliding cache keeps all tokens instead of none, and the text is wrong
        self._require(window is None or window > 1, "sliding_window", "None or at least 2")
        self._require(cap is None or cap > 0, "final_logit_softcapping", "None or positive")
        if self.layer_types is None or self.layer_types == self._followed_layer_types:
            self.layer_types: list[str] = self._default_layer_types()
        elif window is not None and set(self.layer_types) == {"full_attention"}:
            logger.warning_once(
                f"sliding_window={window} has no effect: layer_types names 'full_attention' for every layer. For "
                "sliding layers, leave layer_types at None, or name 'sliding_attention'"
            )
        self._followed_layer_types = self._default_layer_types()
        known = {"full_attention", "sliding_attention"}
        self._require(set(self.layer_types) <= known, "layer_types", f"a list over {sorted(known)}")
        if len(set(self.layer_types)) == 1:  # layers of one type follow a later change of num_hidden_layers
            self.layer_types = self.layer_types[:1] * self.num_hidden_layers
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"{type(self).__name__}: layer_types names {len(self.layer_types)} layers, but "
                f"num_hidden_layers={self.num_hidden_layers}: give one entry per layer"
            )
        if window is None and "sliding_attention" in self.layer_types:
            raise ValueError(
                f"{type(self).__name__}: layer_types has 'sliding_attention' layers, but sliding_window=None: "
                "set sliding_window to the number of tokens such a layer sees"
            )


MyGPT2Config.register_for_auto_class()
