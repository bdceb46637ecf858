"""MyGPT2: GPT-2 with switches. Copied as it is into Hub repos: imports torch, transformers and its siblings only.

    tokens ─ embed_tokens (+ embed_positions) ─ N × [ norm ─ attention ─ + ─ norm ─ MLP ─ + ] ─ norm ─ lm_head

Shapes in comments: B batch, T tokens, H query heads, K key/value heads, D head_dim, C hidden_size.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention import (
    ALL_ATTENTION_FUNCTIONS,
    apply_rotary,
    eager_attention_forward,
    masks_by_layer_type,
    norm_heads,
    positions_in_cache,
    rotary_of,
)
from .base import MyPreTrainedModel, check_ids, check_inputs, check_length, is_placeholder, make_norm, own_layers
from .compat import TP_COLWISE_GATHERED
from .configuration_mygpt2 import MyGPT2Config
from .cpu_kernels import dense_mlp, gated_mlp, linear_by_onednn, make_activation, trained_as
from .decode_step import in_one_call
from .decoding import in_one_function
from .heads import LastTokenHead, make_classifier
from .int8 import METHOD  # noqa: F401  registers the method; releases up to 5.6 fetch only files that are imported here
from .int8_layers import Int8Linear  # noqa: F401
from .int8_products import multiply  # noqa: F401
from .losses import causal_lm_loss, next_labels, soft_cap
from .padding import may_skip_padding, skips_padding
from .products import one_dnn  # noqa: F401
from .tokenwise import calls_of_class  # noqa: F401
from .vllm_adapter import adapt_decoder, pools_for_vllm


# `set_attn_implementation` searches this file for `eager_attention_forward`, and for
# `ALL_ATTENTION_FUNCTIONS.get_interface(` (after 5.0) or `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`.
# vLLM reads the source of `forward`: it must call the attention function, with `scaling=`, and each projection once.
class MyGPT2Attention(nn.Module):
    """Causal self-attention, grouped-query if `num_key_value_heads < num_attention_heads`."""

    def __init__(self, config: MyGPT2Config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.attention_dropout = config.attn_pdrop
        self.scaling = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=bias)
        self.o_proj.is_residual_projection = True
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = make_norm(config.norm_type, config.head_dim, config.layer_norm_epsilon)
            self.k_norm = make_norm(config.norm_type, config.head_dim, config.layer_norm_epsilon)

    @linear_by_onednn
    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cache_position: torch.Tensor,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads)  # [B, T, H, D]
        key = self.k_proj(hidden_states).view(heads)  # [B, T, K, D]
        value = self.v_proj(hidden_states).view(heads)
        if self.qk_norm:
            query, key = norm_heads(self.q_norm, query), norm_heads(self.k_norm, key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H or K, T, D]
        if rotary is not None:
            query, key = apply_rotary(query, *rotary), apply_rotary(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        rate, window = self.attention_dropout if self.training else 0.0, self.sliding_window
        mixed, weights = attention(
            self, query, key, value, attention_mask, dropout=rate, scaling=self.scaling, sliding_window=window, **kwargs
        )  # [B, T, H, D]
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class MyGPT2DenseMLP(nn.Module):
    def __init__(self, config: MyGPT2Config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_projection = True
        self.act_fn = make_activation(config.activation_function)

    @linear_by_onednn
    @trained_as(dense_mlp)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class MyGPT2GatedMLP(nn.Module):
    def __init__(self, config: MyGPT2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_projection = True
        self.act_fn = make_activation(config.activation_function)

    @linear_by_onednn
    @trained_as(gated_mlp)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


MLPS = {"dense": MyGPT2DenseMLP, "gated": MyGPT2GatedMLP}


class MyGPT2Block(GradientCheckpointingLayer):
    def __init__(self, config: MyGPT2Config, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.input_layernorm = make_norm(config.norm_type, config.hidden_size, config.layer_norm_epsilon)
        self.self_attn = MyGPT2Attention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config.norm_type, config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLPS[config.mlp_type](config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    @in_one_function
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        hidden_states = hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
        return hidden_states, weights


class MyGPT2PreTrainedModel(MyPreTrainedModel):
    config_class = MyGPT2Config
    base_model_prefix = "model"
    _no_split_modules = ["MyGPT2Block"]


class MyGPT2Model(MyGPT2PreTrainedModel):
    """The blocks without a head."""

    def __init__(self, config: MyGPT2Config):
        super().__init__(config)
        config.check_consistency()  # fields may have changed since the config was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(MyGPT2Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config.norm_type, config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        adapt_decoder(self)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def get_decoder(self) -> nn.Module:
        return self

    def embed(
        self, inputs_embeds: torch.Tensor, token_type_ids: torch.Tensor | None, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Add position and token-type embeddings; later pipeline stages return their input, which is hidden states."""
        if is_placeholder(self.layers[0]):
            return inputs_embeds
        hidden_states = inputs_embeds
        if self.config.position_embedding_type == "learned":
            check_ids("position_ids", position_ids, self.config.max_position_embeddings, "max_position_embeddings")
            hidden_states = hidden_states + self.embed_positions(position_ids).to(hidden_states.device)
        if token_type_ids is not None:
            check_ids("token_type_ids", token_type_ids, self.config.vocab_size, "vocab_size")
            hidden_states = hidden_states + self.embed_tokens(token_type_ids)
        return self.dropout(hidden_states)

    @can_return_tuple
    @pools_for_vllm
    @skips_padding
    @linear_by_onednn
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: `[batch, length]` tokens, only the new ones when `past_key_values` holds the rest.
            past_key_values: a cache of keys and values, any kind that transformers offers.
            attention_mask: `[batch, past + length]`, 1 for tokens and 0 for padding; or an additive
                `[batch, 1, length, past + length]` mask; or a dict of such masks by layer type.
            token_type_ids: `[batch, length]`; as in GPT-2, their *token* embeddings are added.
            position_ids: `[batch, length]`. Without cache and `attention_mask`, positions that start over mark
                packed sequences, which do not attend to each other.
            inputs_embeds: `[batch, length, hidden_size]` instead of `input_ids`.
            use_cache: return `past_key_values` for the next call. Default: `config.use_cache`, but not in training.
            output_attentions, output_hidden_states: also return these; attentions are computed by `eager` attention.
            skip_padding: skip padding where that is faster (never with a cache); hidden states at padding are then 0.

        Returns:
            `last_hidden_state` `[batch, length, hidden_size]`, after the last norm, and what was requested:
            `hidden_states` has `num_hidden_layers + 1` entries, the last one being `last_hidden_state`.

        Raises:
            ValueError: none or both of `input_ids` and `inputs_embeds` given; a token or position out of range.
        """
        config = self.config
        check_inputs(input_ids, inputs_embeds)
        output_attentions, output_hidden_states = self._outputs_wanted(output_attentions, output_hidden_states)
        use_cache, past_key_values = self._cache_wanted(use_cache, past_key_values)
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, config.vocab_size, "vocab_size")
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, C]

        # assisted decoding with early exit lowers `num_hidden_layers` temporarily
        layers = own_layers(self.layers, config.num_hidden_layers)
        # popped from kwargs: 5.4 and newer warn about `cache_position` in a signature
        cache_position = positions_in_cache(layers, inputs_embeds, past_key_values, kwargs.pop("cache_position", None))
        if position_ids is None and config.position_embedding_type == "learned":
            check_length(inputs_embeds.shape[1], config.max_position_embeddings)
        positions = cache_position[None] if position_ids is None else position_ids
        mask_inputs = (attention_mask, past_key_values, position_ids, cache_position)
        masks = masks_by_layer_type(config, layers, inputs_embeds, *mask_inputs, output_attentions)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)

        hidden_states = self.embed(inputs_embeds, token_type_ids, positions)
        kwargs["rotary"] = rotary_of(config, positions, hidden_states.dtype)
        kwargs |= {"cache_position": cache_position, "position_ids": positions, "output_attentions": output_attentions}
        all_hidden_states, all_attentions = [], []
        hidden_states, layers = in_one_call(layers, hidden_states, masks, past_key_values, output_hidden_states, kwargs)
        for layer in layers:
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states, attention_mask=masks[layer.layer_type], past_key_values=past_key_values, **kwargs
            )
            if output_attentions:
                all_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class MyGPT2ForCausalLM(MyGPT2PreTrainedModel, GenerationMixin):
    """MyGPT2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": TP_COLWISE_GATHERED}
    _pp_plan: dict[str, Any] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    shifts_labels = True

    def __init__(self, config: MyGPT2Config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # otherwise derived from the class name, which a subclass may change
        self.loss_function = causal_lm_loss
        self.model = MyGPT2Model(config)
        self.model.shifts_labels = True  # the model that the Trainer sees under PEFT's prefix tuning
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model

    @linear_by_onednn
    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        return soft_cap(self.lm_head(states), self.config.final_logit_softcapping)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at each position. Arguments beyond `MyGPT2Model`'s:

        Args:
            labels: `[batch, length]`, usually `input_ids`: they are shifted by one inside; -100 is ignored. On a CPU, the
                gradient of the loss goes to the hidden states directly, not through `logits`; if you need it there, set
                `model.loss_function` to transformers' `ForCausalLMLoss`.
            logits_to_keep: compute logits only for this number of last positions (0: all), or for these indices.

        Returns:
            `logits` `[batch, kept, vocab_size]`, with `labels` the mean cross-entropy in nats as `loss`.
        """
        predicted = next_labels(labels, kwargs.get("shift_labels"))
        outputs = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            skip_padding=may_skip_padding(self, predicted, attention_mask, kwargs.pop("skip_padding", None)),
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = outputs.last_hidden_state[:, kept]
        logits = self.logits_of(states)
        loss = None
        if labels is not None:
            if self.loss_function is causal_lm_loss:
                kwargs["made_of"] = (states, self.lm_head, self.config.final_logit_softcapping)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MyGPT2ForSequenceClassification(LastTokenHead, MyGPT2PreTrainedModel):
    """MyGPT2 with a classification head on the last token of each sequence."""

    def __init__(self, config: MyGPT2Config):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"  # otherwise derived from the class name
        self.num_labels = config.num_labels
        self.model = MyGPT2Model(config)
        self.score = make_classifier(config, bias=False)
        self.post_init()


MyGPT2Model.register_for_auto_class("AutoModel")
MyGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MyGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
