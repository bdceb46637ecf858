"""The settings of the network, in a dataclass, and those of the Hub, in a config."""
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Optional, Union

from transformers import AutoConfig, PretrainedConfig

__all__ = ["ModelConfig", "MiniLLaDAConfig"]


class StrEnum(str, Enum):
    def __str__(self) -> str:
        return self.value


class BlockType(StrEnum):
    sequential = "sequential"
    llama = "llama"


@dataclass
class ModelConfig:
    d_model: int = 32
    n_heads: int = 4
    n_layers: int = 2
    mlp_hidden_size: int = 48
    block_type: BlockType = BlockType.llama
    rope: bool = True
    rope_theta: float = 500.0
    max_sequence_length: int = 64
    include_bias: bool = False
    vocab_size: int = 62
    embedding_size: Optional[int] = 64
    weight_tying: bool = True
    mask_token_id: int = 61
    init_device: Optional[str] = None
    init_std: float = 0.02
    precision: Optional[str] = None


class MiniLLaDAConfig(PretrainedConfig):
    model_type = "mini_llada"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, use_cache: bool = False, **kwargs):
        model_config = ModelConfig()
        all_kwargs = asdict(model_config)
        all_kwargs.update(kwargs)
        all_kwargs.update({"use_cache": use_cache})
        all_kwargs.update({"architectures": all_kwargs.get("architectures", ["MiniLLaDAModelLM"])})
        super().__init__(**all_kwargs)

    @property
    def num_attention_heads(self):
        return self.n_heads

    @property
    def num_hidden_layers(self):
        return self.n_layers

    @property
    def hidden_size(self):
        return self.d_model
