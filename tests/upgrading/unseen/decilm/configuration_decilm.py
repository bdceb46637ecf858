from transformers.models.llama.configuration_llama import LlamaConfig


class DeciLMConfig(LlamaConfig):
    model_type = "mini_decilm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, num_key_value_heads_per_layer=None, naive_attention_prefill=False, **kwargs):
        self.num_key_value_heads_per_layer = num_key_value_heads_per_layer
        self.naive_attention_prefill = naive_attention_prefill
        super().__init__(**kwargs)
