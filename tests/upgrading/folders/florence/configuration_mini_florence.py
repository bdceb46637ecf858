import warnings
from typing import Optional

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


class MiniVisionConfig(PretrainedConfig):
    model_type = "mini_davit"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, drop_path_rate=0.1, patch_size=4, dim_embed=(12, 24), projection_dim=24, **kwargs):
        self.drop_path_rate = drop_path_rate
        self.patch_size = patch_size
        self.dim_embed = dim_embed
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


class MiniLanguageConfig(PretrainedConfig):
    model_type = "mini_florence_language"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_attention_heads": "encoder_attention_heads", "hidden_size": "d_model"}

    def __init__(self, vocab_size=64, max_position_embeddings=64, encoder_layers=1, encoder_attention_heads=3, decoder_layers=2,
                 decoder_attention_heads=3, d_model=24, init_std=0.02, scale_embedding=False, use_cache=True, num_labels=3,
                 pad_token_id=1, bos_token_id=0, eos_token_id=2, is_encoder_decoder=True, decoder_start_token_id=2,
                 forced_eos_token_id=2, **kwargs):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.d_model = d_model
        self.encoder_layers = encoder_layers
        self.encoder_attention_heads = encoder_attention_heads
        self.decoder_layers = decoder_layers
        self.decoder_attention_heads = decoder_attention_heads
        self.init_std = init_std
        self.use_cache = use_cache
        self.num_hidden_layers = encoder_layers
        self.scale_embedding = scale_embedding
        super().__init__(
            num_labels=num_labels,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            is_encoder_decoder=is_encoder_decoder,
            decoder_start_token_id=decoder_start_token_id,
            forced_eos_token_id=forced_eos_token_id,
            **kwargs,
        )
        # ensure backward compatibility
        if self.forced_bos_token_id is None and kwargs.get("force_bos_token_to_be_generated", False):
            self.forced_bos_token_id = self.bos_token_id
            warnings.warn(f"Please make sure the config includes `forced_bos_token_id={self.bos_token_id}` in future versions.")


class MiniFlorenceConfig(PretrainedConfig):
    model_type = "mini_florence"
    is_composition = False

    def __init__(self, vision_config=None, text_config=None, ignore_index=-100, vocab_size=64, projection_dim=24, **kwargs):
        self.ignore_index = ignore_index
        self.vocab_size = vocab_size
        self.projection_dim = projection_dim
        if vision_config is not None:
            vision_config = MiniVisionConfig(**vision_config)
        self.vision_config = vision_config
        self.text_config = text_config
        if text_config is not None:
            self.text_config = MiniLanguageConfig(**text_config)
        super().__init__(**kwargs)
