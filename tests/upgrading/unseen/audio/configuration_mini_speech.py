import functools
import operator

from transformers import PretrainedConfig


class MiniSpeechConfig(PretrainedConfig):
    model_type = "mini_speech"

    def __init__(
        self,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        conv_dim=(12, 24),
        conv_kernel=(10, 4),
        conv_stride=(5, 2),
        max_source_positions=200,
        layerdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **kwargs,
    ):
        super().__init__(**kwargs, pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.conv_dim = list(conv_dim)
        self.conv_kernel = list(conv_kernel)
        self.conv_stride = list(conv_stride)
        self.max_source_positions = max_source_positions
        self.layerdrop = layerdrop

    @property
    def inputs_to_logits_ratio(self):
        return functools.reduce(operator.mul, self.conv_stride, 1)
