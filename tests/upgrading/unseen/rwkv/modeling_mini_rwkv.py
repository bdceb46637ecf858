"""A recurrent decoder: every layer keeps its last input and a decayed sum."""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, is_ninja_available, is_torch_cuda_available, logging

from .configuration_mini_rwkv import MiniRwkvConfig

logger = logging.get_logger(__name__)


class TimeMix(nn.Module):
    def __init__(self, config, layer_id):
        super().__init__()
        self.layer_id = layer_id
        size = config.hidden_size
        self.time_decay = nn.Parameter(torch.linspace(-1.0, 1.0, size))
        self.time_mix = nn.Parameter(torch.full((1, 1, size), 0.5))
        self.key, self.value = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.receptance, self.output = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        ratio = layer_id / max(config.num_hidden_layers - 1, 1)
        self.register_buffer(
            "time_curve", torch.tensor([1.0 - ratio * 0.1 * i / size for i in range(size)]), persistent=False
        )

    def forward(self, x, state):
        last, total = state
        shifted = torch.cat([last[:, None], x[:, :-1]], dim=1)
        mixed = x * self.time_mix + shifted * (1 - self.time_mix)
        key, value, gate = self.key(mixed), self.value(mixed) * self.time_curve, torch.sigmoid(self.receptance(mixed))
        decay = torch.exp(-torch.exp(self.time_decay))
        rows = []
        for i in range(x.shape[1]):
            total = total * decay + torch.tanh(key[:, i]) * value[:, i]
            rows.append(total)
        return self.output(torch.stack(rows, 1) * gate), [x[:, -1], total]


class RwkvBlock(nn.Module):
    def __init__(self, config, layer_id):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = TimeMix(config, layer_id)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, 32), nn.ReLU(), nn.Linear(32, config.hidden_size)
        )

    def forward(self, x, state):
        mixed, state = self.attention(self.ln1(x), state)
        x = x + mixed
        return x + self.feed_forward(self.ln2(x)), state


class MiniRwkvPreTrainedModel(PreTrainedModel):
    config_class = MiniRwkvConfig
    base_model_prefix = "rwkv"
    _no_split_modules = ["RwkvBlock"]
    _keep_in_fp32_modules = ["time_decay"]
    supports_gradient_checkpointing = True
    _is_stateful = True

    def _init_weights(self, module):
        """Initialize the weights."""
        if isinstance(module, TimeMix):
            size = module.time_decay.shape[0]
            with torch.no_grad():
                module.time_decay.data = torch.linspace(
                    -1.0, 1.0, size, dtype=module.time_decay.dtype, device=module.time_decay.device
                )
                module.time_mix.data.fill_(0.5)


@dataclass
class RwkvOutput(ModelOutput):
    last_hidden_state: torch.FloatTensor = None
    state: Optional[List[torch.FloatTensor]] = None


@dataclass
class RwkvCausalLMOutput(ModelOutput):
    loss: Optional[torch.FloatTensor] = None
    logits: torch.FloatTensor = None
    state: Optional[List[torch.FloatTensor]] = None


class MiniRwkvModel(MiniRwkvPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([RwkvBlock(config, layer_id=idx) for idx in range(config.num_hidden_layers)])
        self.ln_out = nn.LayerNorm(config.hidden_size)
        self.layers_are_rescaled = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value):
        self.embeddings = value

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, state=None, use_cache=None, return_dict=None
    ):
        use_cache = use_cache if use_cache is not None else (self.config.use_cache if not self.training else False)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if state is None:
            shape = (x.size(0), self.config.hidden_size)
            state = [[torch.zeros(shape, dtype=x.dtype, device=x.device) for _ in range(2)] for _ in self.blocks]
        made = []
        for block, own in zip(self.blocks, state):
            x, new = block(x, own)
            made.append(new)
        return RwkvOutput(last_hidden_state=self.ln_out(x), state=made if use_cache else None)


class MiniRwkvForCausalLM(MiniRwkvPreTrainedModel):
    _tied_weights_keys = ["head.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.rwkv = MiniRwkvModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, new_embeddings):
        self.head = new_embeddings

    def generate(self, *args, **kwargs):
        try:
            gen_output = super().generate(*args, **kwargs)
        except AttributeError as exc:
            if "past_key_values" in str(exc):
                raise AttributeError("this model has no past_key_values: use another strategy") from exc
            raise exc
        return gen_output

    def prepare_inputs_for_generation(self, input_ids, state=None, inputs_embeds=None, **kwargs):
        # only last token for inputs_ids if the state is passed along.
        if state is not None:
            input_ids = input_ids[:, -1].unsqueeze(-1)
        if inputs_embeds is not None and state is None:
            model_inputs = {"inputs_embeds": inputs_embeds}
        else:
            model_inputs = {"input_ids": input_ids}
        model_inputs["state"] = state
        model_inputs["use_cache"] = kwargs.get("use_cache")
        return model_inputs

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        state=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        outputs = self.rwkv(input_ids, inputs_embeds=inputs_embeds, state=state, use_cache=use_cache)
        logits = self.head(outputs[0])
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return RwkvCausalLMOutput(loss=loss, logits=logits, state=outputs.state)
