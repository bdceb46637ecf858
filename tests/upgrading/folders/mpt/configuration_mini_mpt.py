"""A config with nested dictionaries."""
from typing import Dict, Optional, Union

from transformers import PretrainedConfig

attn_config_defaults: Dict = {"attn_pdrop": 0.0, "attn_impl": "torch", "alibi": False, "alibi_bias_max": 8, "qk_ln": False}
init_config_defaults: Dict = {"name": "normal", "init_std": 0.02}


class MiniMPTConfig(PretrainedConfig):
    model_type = "mini_mpt"

    def __init__(
        self,
        d_model: int = 24,
        n_heads: int = 3,
        n_layers: int = 2,
        expansion_ratio: int = 2,
        max_seq_len: int = 64,
        vocab_size: int = 68,
        resid_pdrop: float = 0.0,
        emb_pdrop: float = 0.0,
        learned_pos_emb: bool = True,
        attn_config: Dict = attn_config_defaults,
        init_device: str = "cpu",
        logit_scale: Optional[Union[float, str]] = None,
        no_bias: bool = False,
        use_cache: bool = False,
        init_config: Dict = init_config_defaults,
        **kwargs,
    ):
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_layers = n_layers
        self.expansion_ratio = expansion_ratio
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.resid_pdrop = resid_pdrop
        self.emb_pdrop = emb_pdrop
        self.learned_pos_emb = learned_pos_emb
        self.attn_config = attn_config
        self.init_device = init_device
        self.logit_scale = logit_scale
        self.no_bias = no_bias
        self.use_cache = use_cache
        self.init_config = init_config
        if "name" in kwargs:
            del kwargs["name"]
        if "loss_fn" in kwargs:
            del kwargs["loss_fn"]
        super().__init__(**kwargs)
        self._validate_config()

    def _set_config_defaults(self, config, config_defaults):
        for k, v in config_defaults.items():
            if k not in config:
                config[k] = v
        return config

    def _validate_config(self):
        self.attn_config = self._set_config_defaults(self.attn_config, attn_config_defaults)
        self.init_config = self._set_config_defaults(self.init_config, init_config_defaults)
        if self.d_model % self.n_heads != 0:
            raise ValueError("d_model must be divisible by n_heads")
