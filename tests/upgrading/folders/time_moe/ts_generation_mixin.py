"""Generation of numbers: the last prediction is appended as it is."""
from typing import Any, Dict, Optional

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput


class TSGenerationMixin(GenerationMixin):
    @torch.no_grad()
    def generate(self, inputs: Optional[torch.Tensor] = None, max_new_tokens: int = 4, use_cache: bool = True, **kwargs):
        series = inputs if inputs is not None else kwargs.pop("input_ids")
        attention_mask = kwargs.pop("attention_mask", None)
        model_kwargs = {"use_cache": use_cache, "attention_mask": attention_mask}
        for _ in range(max_new_tokens):
            outputs = self(**self.prepare_inputs_for_generation(series, **model_kwargs), return_dict=True)
            series = torch.cat([series, outputs.logits[:, -1, :1].reshape(len(series), 1).type_as(series)], dim=1)
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs, horizon_length=1)
        return series

    def _update_model_kwargs_for_generation(
        self,
        outputs: ModelOutput,
        model_kwargs: Dict[str, Any],
        horizon_length: int = 1,
        is_encoder_decoder: bool = False,
        standardize_cache_format: bool = False,
    ) -> Dict[str, Any]:
        model_kwargs["past_key_values"] = self._extract_past_from_model_output(
            outputs, standardize_cache_format=standardize_cache_format
        )
        if getattr(outputs, "state", None) is not None:
            model_kwargs["state"] = outputs.state
        if model_kwargs.get("attention_mask") is not None:
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones((mask.shape[0], horizon_length))], dim=-1)
        return model_kwargs
