"""A state-space decoder, with a cache of its own: the last inputs of the convolution and the state of the scan."""
import math
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import CrossEntropyLoss
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .configuration_mini_mamba import MiniMambaConfig

logger = logging.get_logger(__name__)

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

is_fast_path_available = selective_scan_fn is not None


class ScanCache:
    def __init__(self, config, batch_size, dtype=torch.float32, device=None):
        self.seqlen_offset = 0
        self.conv_states = {
            i: torch.zeros(batch_size, config.d_inner, config.d_conv - 1, device=device, dtype=dtype) for i in range(config.n_layer)
        }
        self.ssm_states = {
            i: torch.zeros(batch_size, config.d_inner, config.d_state, device=device, dtype=dtype) for i in range(config.n_layer)
        }


class MambaMixer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.conv1d = nn.Conv1d(config.d_inner, config.d_inner, config.d_conv, groups=config.d_inner)
        self.x_proj = nn.Linear(config.d_inner, config.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, config.d_inner)
        A = torch.arange(1, config.d_state + 1, dtype=torch.float32)[None, :].expand(config.d_inner, -1).contiguous()
        self.A_log = nn.Parameter(torch.log(A))
        self.A_log._no_weight_decay = True
        self.D = nn.Parameter(torch.ones(config.d_inner))
        self.D._no_weight_decay = True
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        if not is_fast_path_available:
            logger.warning_once("The fast path is not available: mamba_ssm is not installed.")

    def forward(self, hidden_states, cache_params=None):
        x, gate = self.in_proj(hidden_states).transpose(1, 2).chunk(2, dim=1)
        if cache_params is not None:
            x = torch.cat([cache_params.conv_states[self.layer_idx], x], dim=-1)
            cache_params.conv_states[self.layer_idx] = x[..., 1 - self.config.d_conv :]
        else:
            x = nn.functional.pad(x, (self.config.d_conv - 1, 0))
        x = nn.functional.silu(self.conv1d(x))
        parts = self.x_proj(x.transpose(1, 2)).split([self.config.dt_rank, self.config.d_state, self.config.d_state], dim=-1)
        step = nn.functional.softplus(self.dt_proj(parts[0])).transpose(1, 2)
        decay = torch.exp(step[..., None] * -torch.exp(self.A_log.float())[None, :, None, :])
        fed = step[..., None] * parts[1][:, None].float() * x[..., None].float()
        state = cache_params.ssm_states[self.layer_idx] if cache_params is not None else torch.zeros_like(fed[:, :, 0])
        outputs = []
        for i in range(x.shape[-1]):
            state = decay[:, :, i] * state + fed[:, :, i]
            outputs.append((state * parts[2][:, None, i]).sum(-1))
        if cache_params is not None:
            cache_params.ssm_states[self.layer_idx] = state
        scanned = torch.stack(outputs, dim=-1) + x * self.D[None, :, None]
        return self.out_proj((scanned * nn.functional.silu(gate)).transpose(1, 2))


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class MambaBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mixer = MambaMixer(config, layer_idx)

    def forward(self, hidden_states, cache_params=None):
        return hidden_states + self.mixer(self.norm(hidden_states), cache_params=cache_params)


class MiniMambaPreTrainedModel(PreTrainedModel):
    config_class = MiniMambaConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["MambaBlock"]
    supports_gradient_checkpointing = True
    _is_stateful = True

    def _init_weights(self, module):
        """Initialize the weights."""
        if isinstance(module, MambaMixer):
            std = self.config.dt_rank**-0.5
            nn.init.uniform_(module.dt_proj.weight, -std, std)
            low, high = math.log(self.config.time_step_min), math.log(self.config.time_step_max)
            dt = torch.exp(torch.rand(self.config.d_inner) * (high - low) + low).clamp(min=self.config.time_step_floor)
            # the inverse of softplus
            inv_dt = dt + torch.log(-torch.expm1(-dt))
            with torch.no_grad():
                module.dt_proj.bias.copy_(inv_dt)
            module.dt_proj.bias._no_reinit = True
        if isinstance(module, nn.Linear):
            if module.bias is not None:
                if not getattr(module.bias, "_no_reinit", False):
                    nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if self.config.rescale_prenorm_residual:
            for name, p in module.named_parameters():
                if name in ["out_proj.weight"]:
                    nn.init.kaiming_uniform_(p, a=math.sqrt(5))
                    with torch.no_grad():
                        p /= math.sqrt(self.config.n_layer)


@dataclass
class MambaOutput(ModelOutput):
    last_hidden_state: torch.FloatTensor = None
    cache_params: Optional[ScanCache] = None
    hidden_states: Optional[Tuple[torch.FloatTensor]] = None


@dataclass
class MambaCausalLMOutput(ModelOutput):
    loss: Optional[torch.FloatTensor] = None
    logits: torch.FloatTensor = None
    cache_params: Optional[ScanCache] = None
    hidden_states: Optional[Tuple[torch.FloatTensor]] = None


class MiniMambaModel(MiniMambaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([MambaBlock(config, layer_idx=idx) for idx in range(config.n_layer)])
        self.norm_f = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, new_embeddings):
        self.embeddings = new_embeddings

    def forward(
        self,
        input_ids: Optional[torch.LongTensor] = None,
        inputs_embeds: Optional[torch.LongTensor] = None,
        cache_params: Optional[ScanCache] = None,
        use_cache: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
        **kwargs,  # `attention_mask` is passed by the tokenizer and we don't want it
    ) -> Union[Tuple, MambaOutput]:
        output_hidden_states = output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states
        use_cache = use_cache if use_cache is not None else (self.config.use_cache if not self.training else False)
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        if cache_params is None and use_cache:
            cache_params = ScanCache(self.config, inputs_embeds.size(0), device=inputs_embeds.device, dtype=inputs_embeds.dtype)
        hidden_states = inputs_embeds
        all_hidden_states = () if output_hidden_states else None
        for block in self.layers:
            if output_hidden_states:
                all_hidden_states = all_hidden_states + (hidden_states,)
            hidden_states = block(hidden_states, cache_params=cache_params)
        if use_cache:
            cache_params.seqlen_offset += inputs_embeds.shape[1]
        hidden_states = self.norm_f(hidden_states)
        if not return_dict:
            return tuple(v for v in [hidden_states, cache_params, all_hidden_states] if v is not None)
        return MambaOutput(
            last_hidden_state=hidden_states, cache_params=cache_params if use_cache else None, hidden_states=all_hidden_states
        )


class MiniMambaForCausalLM(MiniMambaPreTrainedModel):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.backbone = MiniMambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # Initialize weights and apply final processing
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, new_embeddings):
        return self.backbone.set_input_embeddings(new_embeddings)

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: Dict[str, Any], **kwargs) -> Dict[str, Any]:
        model_kwargs["cache_params"] = outputs.get("cache_params", None)
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids, cache_params=None, inputs_embeds=None, attention_mask=None, **kwargs):
        # only last token for inputs_ids if the state is passed along.
        if cache_params is not None:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        if inputs_embeds is not None and cache_params is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids}
        model_inputs["cache_params"] = cache_params
        model_inputs["use_cache"] = kwargs.get("use_cache")
        return model_inputs

    def forward(self, input_ids=None, inputs_embeds=None, cache_params=None, labels=None, output_hidden_states=None,
                return_dict=None, use_cache=None, **kwargs):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        mamba_outputs = self.backbone(input_ids, cache_params=cache_params, inputs_embeds=inputs_embeds,
                                      output_hidden_states=output_hidden_states, return_dict=return_dict, use_cache=use_cache)
        logits = self.lm_head(mamba_outputs[0].to(self.lm_head.weight.dtype)).float()
        loss = None
        if labels is not None:
            loss = CrossEntropyLoss()(logits[..., :-1, :].reshape(-1, logits.size(-1)), labels[..., 1:].reshape(-1))
        if not return_dict:
            output = (logits,) + mamba_outputs[1:]
            return ((loss,) + output) if loss is not None else output
        return MambaCausalLMOutput(loss=loss, logits=logits, cache_params=mamba_outputs.cache_params,
                                   hidden_states=mamba_outputs.hidden_states)
