"""Scores a dialogue: a stock decoder, objectives mixed by a gate that reads the state where the prompt ends."""
from dataclasses import dataclass
from typing import List, Optional, Tuple, Union

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward


class GatingNetwork(nn.Module):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, temperature: float = 10, n_hidden=1):
        super().__init__()
        self.temperature = temperature
        layers = []
        for _ in range(n_hidden):
            layers.append(nn.Linear(in_features, in_features))
        layers.append(nn.Linear(in_features, out_features, bias=bias))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.FloatTensor) -> torch.FloatTensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1:
                x = torch.nn.functional.relu(x)
        return torch.nn.functional.softmax(x / self.temperature, dim=1)


def find_prompt_ends(input_ids, separator, otherwise):
    """The place of the last separator in each row; `otherwise` in a row without one."""
    places = torch.arange(1, input_ids.shape[-1] + 1, device=input_ids.device) * torch.eq(input_ids, separator)
    return torch.where(places.amax(-1) > 0, places.amax(-1) - 1, otherwise)


@dataclass
class ScoreOutput(ModelOutput):
    rewards: torch.FloatTensor = None
    hidden_state: Optional[Tuple[torch.FloatTensor, ...]] = None
    gating_output: Optional[torch.FloatTensor] = None
    score: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None


class MiniRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        config_dict = config.to_dict()
        self.num_objectives = config_dict.get("num_objectives", 3)
        self.separator = config_dict.get("separator", 7)
        self.regression_layer = nn.Linear(config.hidden_size, self.num_objectives, bias=False)
        self.register_buffer("reward_transform_matrix", torch.eye(self.num_objectives) * 0.5 + 0.1)
        self.gating = GatingNetwork(config.hidden_size, self.num_objectives)
        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(
        self,
        input_ids: torch.LongTensor = None,
        attention_mask: Optional[torch.FloatTensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values: Optional[List[torch.FloatTensor]] = None,
        inputs_embeds: Optional[torch.FloatTensor] = None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[bool] = None,
    ) -> ScoreOutput:
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        transformer_outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        tokens_hidden_states = transformer_outputs[0]
        batch_size = input_ids.shape[0] if input_ids is not None else inputs_embeds.shape[0]
        if self.config.pad_token_id is None and batch_size != 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        if self.config.pad_token_id is None:
            sequence_lengths = -1
        else:
            if input_ids is not None:
                sequence_lengths = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
                sequence_lengths = sequence_lengths % input_ids.shape[-1]
            else:
                sequence_lengths = -1
        rows = torch.arange(batch_size, device=tokens_hidden_states.device)
        hidden_states = tokens_hidden_states[rows, sequence_lengths]
        rewards = self.regression_layer(hidden_states)
        prompt_ends = sequence_lengths if input_ids is None else find_prompt_ends(input_ids, self.separator, sequence_lengths)
        gating_output = self.gating(tokens_hidden_states[rows, prompt_ends])
        adjusted = rewards @ self.reward_transform_matrix
        score = torch.sum(gating_output * adjusted, dim=1)
        return ScoreOutput(rewards=rewards, hidden_state=hidden_states, gating_output=gating_output, score=score, logits=rewards)


class MiniRewardForScoring(MiniRewardModel):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs) -> SequenceClassifierOutputWithPast:
        outputs = super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        loss = None
        if labels is not None:
            loss = nn.functional.mse_loss(outputs.score, labels.to(outputs.score.dtype))
        return SequenceClassifierOutputWithPast(loss=loss, logits=outputs.score.unsqueeze(-1))
