"""MyGPT2: GPT-2 with switches. Copied as it is into Hub repos: imports torch, transformers and its siblings only.

    tokens ─ embed_tokens (+ embed_positions) ─ N × [ norm ─ attention ─ + ─ norm ─ MLP ─ + ] ─ norm ─ lm_head

Shapes in comments: B batch, T tokens, H query heads, K key/value heads, D head_dim, C hidden_size.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple, logging

from .attention import (
    Packing,
    apply_rotary,
    attend_apart,
    attend_in_blocks,
    attends_in_blocks,
    eager_attention_forward,
    find_packing,
    lengths_for_engine,
    may_skip_padding,
    packed_lengths,
    rotary_cos_sin,
    spread,
    unpacked,
)
from .configuration_mygpt2 import MyGPT2Config
from .kernels import fast_products, few_row_products, keeps_less, make_activation, product_of
from .layers import (
    ALL_ATTENTION_FUNCTIONS,
    NORMS,
    SHARED_OUT_AND_GATHERED,
    MyPreTrainedModel,
    check_ids,
    check_length,
    check_not_empty,
    create_causal_mask,
    create_sliding_window_causal_mask,
    is_elsewhere,
    make_classifier,
    readable,
    rename_while_loading,
    served_class,
    with_eager_attention,
)
from .losses import causal_lm_loss, soft_cap

logger = logging.get_logger(__name__)

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def make_norm(config: MyGPT2Config, width: int) -> nn.Module:
    return NORMS[config.norm_type](width, eps=config.layer_norm_epsilon)


# `set_attn_implementation` looks for texts in this file: `eager_attention_forward`, and after 5.0
# `ALL_ATTENTION_FUNCTIONS.get_interface(`, before that `ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]`.
# vLLM reads the source of `forward` too: the function has to be looked up there and called once, with `scaling=`, and
# each projection to be called plainly, once.
class MyGPT2Attention(nn.Module):
    """Causal self-attention, grouped-query if `num_key_value_heads < num_attention_heads`."""

    def __init__(self, config: MyGPT2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
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
            self.q_norm = make_norm(config, config.head_dim)
            self.k_norm = make_norm(config, config.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cache_position: torch.Tensor,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        with few_row_products(self.o_proj, hidden_states):
            query = self.q_proj(hidden_states)
            key = self.k_proj(hidden_states)
            value = self.v_proj(hidden_states)
        query, key, value = query.view(heads), key.view(heads), value.view(heads)  # [B, T, H or K, D]
        if self.qk_norm:
            # under autocast the projections are narrower than the norm's weight
            wide = self.q_norm.weight.dtype
            query = self.q_norm(query.to(wide)).to(value.dtype)
            key = self.k_norm(key.to(wide)).to(value.dtype)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H or K, T, D]
        if rotary is not None:
            cos, sin = rotary
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, {"cache_position": cache_position})

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if kwargs.get("output_attentions"):
            attention = eager_attention_forward
        elif isinstance(packing, Packing):
            attention = partial(attend_apart, attention, packing)
        elif attention_mask is None and attends_in_blocks(self.config, query, self.sliding_window):
            attention = partial(attend_in_blocks, attention)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # [B, T, H, D]
        with few_row_products(self.o_proj, hidden_states):
            return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


class MyGPT2DenseMLP(nn.Module):
    def __init__(self, config: MyGPT2Config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_projection = True
        self.act_fn = make_activation(config.activation_function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if keeps_less(self, x):
            return self.trained(x)
        with few_row_products(self.down_proj, x):
            return self.down_proj(self.act_fn(self.up_proj(x)))

    def trained(self, x: torch.Tensor) -> torch.Tensor:
        return product_of(self.act_fn, self.down_proj, self.up_proj(x))


class MyGPT2GatedMLP(nn.Module):
    def __init__(self, config: MyGPT2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_projection = True
        self.act_fn = make_activation(config.activation_function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if keeps_less(self, x):
            return self.trained(x)
        with few_row_products(self.down_proj, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def trained(self, x: torch.Tensor) -> torch.Tensor:
        return product_of(lambda gate, up: self.act_fn(gate) * up, self.down_proj, self.gate_proj(x), self.up_proj(x))


MLPS = {"dense": MyGPT2DenseMLP, "gated": MyGPT2GatedMLP}


class MyGPT2Block(GradientCheckpointingLayer):
    def __init__(self, config: MyGPT2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = MyGPT2Attention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.mlp = MLPS[config.mlp_type](config)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        with fast_products(hidden_states):
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
        self.norm = make_norm(config, config.hidden_size)
        self.gradient_checkpointing = False
        self.classifies_for_engine = self._prepare_for_engine()
        self.post_init()

    def _prepare_for_engine(self) -> bool:
        """Whether an engine that serves this model shall find each sequence's last state wherever it looks."""
        served = served_class(self.config)
        if served is None or not served.endswith(("ForSequenceClassification", "Model")):
            return False
        if served.endswith("Model"):
            logger.warning_once(
                "vLLM makes embeddings of a base model's first token unless told otherwise, which here has seen nothing "
                'else: pass --pooler-config \'{"pooling_type": "LAST"}\', or "MEAN"'
            )
            return False
        rename_while_loading(served, r"^score\.", "classifier.")  # vLLM's own name of any such head
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def get_decoder(self) -> nn.Module:
        return self

    def _layers_in_blocks(
        self,
        given: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        layer_idx: int,
    ) -> set[str]:
        """The layer types that run in blocks without a mask: with a window, on whole rows with nothing before them."""
        if not attends_in_blocks(self.config, given[:, None], self.config.sliding_window):
            return set()
        if past_key_values is not None and (
            type(past_key_values) is not DynamicCache or past_key_values.get_seq_length(layer_idx) > 0
        ):
            return set()
        if attention_mask is None:
            whole = position_ids is None or past_key_values is not None  # else rows may be packed
        else:
            whole = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and bool(attention_mask.all())
        return {"sliding_attention"} & set(self.config.layer_types) if whole else set()

    @can_return_tuple
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
        skip_padding: bool = True,
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
                sequences packed in one row, which then do not see each other.
            inputs_embeds: `[batch, length, hidden_size]` instead of `input_ids`.
            use_cache: return `past_key_values` for the next call. Default: `config.use_cache`, but not in training.
            output_attentions, output_hidden_states: also return them; for attentions, `eager` computes this call.
            skip_padding: where it is faster (not with a cache), compute nothing for padding; its hidden states are then 0.

        Returns:
            `last_hidden_state` `[batch, length, hidden_size]`, after the last norm, and what was asked for:
            `hidden_states` has `num_hidden_layers + 1` entries, the last one being `last_hidden_state`.

        Raises:
            ValueError: none or both of `input_ids` and `inputs_embeds` given; a token or position out of range.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions, output_hidden_states = self._outputs_wanted(output_attentions, output_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        given: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds
        check_not_empty(given)
        length = given.shape[1]
        # in a pipeline the stages after the first get hidden states as `inputs_embeds`, their own layers come later
        own_layers = [index for index, layer in enumerate(self.layers) if not is_elsewhere(layer)]
        later_stage, staged = is_elsewhere(self.layers[0]), len(own_layers) < len(self.layers)
        first_of = {self.config.layer_types[index]: index for index in reversed(own_layers)} if staged else {}

        cache_position = kwargs.pop("cache_position", None)  # by name in the signature, 5.4 and newer would warn
        first = min(own_layers, default=0)
        if cache_position is None:
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length(first)
            cache_position = torch.arange(length, device=given.device) + past_length

        packing = None
        if past_key_values is None and not use_cache and readable():
            lengths = packed_lengths(position_ids, attention_mask)
            wanted = (output_attentions, output_hidden_states)
            packing = find_packing(self, __name__, given, attention_mask, lengths, wanted, skip_padding)
        limit = self.config.max_position_embeddings
        learned = self.config.position_embedding_type == "learned"
        positions = position_ids
        if positions is None:
            if learned:
                check_length(length, limit)
            positions = cache_position[None]
        if packing is not None:
            input_ids, inputs_embeds = packing.take(input_ids), packing.take(inputs_embeds)
            token_type_ids, positions = packing.take(token_type_ids), packing.take(positions)
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size, "vocab_size")
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, C]

        in_blocks = set()
        if not output_attentions:
            in_blocks = self._layers_in_blocks(given, attention_mask, position_ids, past_key_values, first)
        # Masks before the cache: transformers looks for packed sequences only where there is none.
        masks: Any = attention_mask
        if packing is not None:
            masks = dict.fromkeys(self.config.layer_types)  # None: each sequence by itself
        elif not isinstance(masks, dict):
            masks = {
                layer_type: MASKS[layer_type](
                    config=with_eager_attention(self.config) if output_attentions else self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                    cache_position=cache_position,
                    layer_idx=first_of.get(layer_type),  # whose cache says how much there is; None: any
                )
                for layer_type in set(self.config.layer_types) - in_blocks
            }
            masks |= dict.fromkeys(in_blocks)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states, rotary = inputs_embeds, None
        if learned and not later_stage:
            check_ids("position_ids", positions, limit, "max_position_embeddings")
            hidden_states = hidden_states + self.embed_positions(positions).to(hidden_states.device)
        elif self.config.position_embedding_type == "rope":
            rotary = rotary_cos_sin(positions, self.config.head_dim, self.config.rope_theta, hidden_states.dtype)
        if token_type_ids is not None and not later_stage:
            check_ids("token_type_ids", token_type_ids, self.config.vocab_size, "vocab_size")
            hidden_states = hidden_states + self.embed_tokens(token_type_ids)
        if not later_stage:
            hidden_states = self.dropout(hidden_states)

        all_hidden_states, all_attentions = [], []
        # the depth by the config: assisted decoding with an early exit lowers it for a while
        for layer, layer_type in zip(self.layers[: self.config.num_hidden_layers], self.config.layer_types):
            if is_elsewhere(layer):
                continue
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states,
                rotary=rotary,
                attention_mask=masks[layer_type],
                past_key_values=past_key_values,
                cache_position=cache_position,
                position_ids=positions,
                packing=packing,
                output_attentions=output_attentions,
                **kwargs,
            )
            if output_attentions:
                all_attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        if packing is not None:
            hidden_states = packing.put(hidden_states)
        if output_hidden_states:
            all_hidden_states.append(hidden_states)
        if self.classifies_for_engine:
            lengths = lengths_for_engine(position_ids)
            ends = torch.tensor(lengths, device=hidden_states.device).cumsum(0) - 1
            hidden_states = spread(hidden_states[0, ends], lengths)

        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class MyGPT2ForCausalLM(MyGPT2PreTrainedModel, GenerationMixin):
    """MyGPT2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": SHARED_OUT_AND_GATHERED}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}
    shifts_labels = True

    def __init__(self, config: MyGPT2Config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # by name, a subclass called otherwise would have other labels counted
        self.loss_function = causal_lm_loss
        self.model = MyGPT2Model(config)
        self.model.shifts_labels = True  # PEFT's prefix tuning shows the Trainer this one
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model

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
            labels: `[batch, length]`, usually `input_ids` itself: the shift by one happens inside; -100 is left out. On a
                CPU the loss is differentiated by the states that the logits were made of, and not by `logits`; for that,
                set `model.loss_function` to transformers' `ForCausalLMLoss`.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for these indices.

        Returns:
            `logits` `[batch, kept, vocab_size]`, with `labels` the mean cross-entropy in nats as `loss`.
        """
        # each position predicts the next label
        predicted = None if labels is None else nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        predicted = kwargs.get("shift_labels", predicted)
        skip_padding = may_skip_padding(self, predicted, attention_mask, kwargs.pop("skip_padding", None))
        outputs = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            skip_padding=skip_padding,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        states = outputs.last_hidden_state[:, kept]
        with fast_products(outputs.last_hidden_state), few_row_products(self.lm_head, outputs.last_hidden_state):
            logits = self.lm_head(states)
        cap = self.config.final_logit_softcapping
        logits = soft_cap(logits, cap)
        loss = None
        if labels is not None:
            if self.loss_function is causal_lm_loss:
                kwargs["made_of"] = (states, self.lm_head, cap)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MyGPT2ForSequenceClassification(MyGPT2PreTrainedModel):
    """MyGPT2 with a classification head on the last token of each sequence."""

    accepts_loss_kwargs = False  # the loss is a mean over examples; the Trainer scales it for gradient accumulation

    def __init__(self, config: MyGPT2Config):
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"  # by name, a subclass called otherwise would get another loss
        self.num_labels = config.num_labels
        self.model = MyGPT2Model(config)
        self.score = make_classifier(config, bias=False)
        self.post_init()

    def _last_token(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, rows: int, length: int):
        """Index of each sequence's last token, padded on either side, `[batch]`."""
        if input_ids is not None and self.config.pad_token_id is not None:
            is_token = input_ids != self.config.pad_token_id
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            is_token = attention_mask[:, -length:].bool()
        elif rows == 1 or input_ids is None:
            return -1
        else:
            raise ValueError(
                f"cannot tell padding from tokens in a batch of {rows}: set config.pad_token_id or pass attention_mask"
            )
        return (is_token * torch.arange(length, device=is_token.device)).argmax(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify each sequence. Arguments beyond `MyGPT2Model`'s:

        Args:
            labels: `[batch]` class numbers, `[batch, num_labels]` 0/1 floats (multi-label), or floats (regression),
                by `config.problem_type`, which is inferred at the first call as everywhere in transformers.

        Returns:
            `logits` `[batch, num_labels]` (packed rows: `[sequences, num_labels]`), with `labels` the `loss`.

        Raises:
            ValueError: several rows, and neither `config.pad_token_id` nor `attention_mask` tells where they end.
        """
        outputs = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        lengths = packed_lengths(position_ids, attention_mask) if past_key_values is None else None
        if lengths is not None:  # packed rows: each sequence in a row of its own
            hidden_states = unpacked(hidden_states, lengths)
            attention_mask = unpacked(torch.ones_like(position_ids), lengths)
            if input_ids is not None:
                input_ids = unpacked(input_ids, lengths, self.config.pad_token_id or 0)
        rows, length = hidden_states.shape[:2]
        last = self._last_token(input_ids, attention_mask, rows, length)
        last = last.to(hidden_states.device) if isinstance(last, torch.Tensor) else last
        logits = self.score(hidden_states[torch.arange(rows, device=hidden_states.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


MyGPT2Model.register_for_auto_class("AutoModel")
MyGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
MyGPT2ForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
