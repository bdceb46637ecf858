"""State-space configuration"""
import math

from transformers import PretrainedConfig


class MiniMambaConfig(PretrainedConfig):
    model_type = "mini_mamba"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}

    def __init__(self, vocab_size=60, d_model=16, n_layer=2, d_state=4, d_conv=3, expand=2, dt_rank="auto", initializer_range=0.1,
                 time_step_min=0.001, time_step_max=0.1, time_step_floor=1e-4, rescale_prenorm_residual=True, use_cache=True,
                 layer_norm_epsilon=1e-5, **kwargs):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.n_layer = n_layer
        self.d_state = d_state
        self.d_conv = d_conv
        self.expand = expand
        self.d_inner = expand * d_model
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.initializer_range = initializer_range
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_floor = time_step_floor
        self.rescale_prenorm_residual = rescale_prenorm_residual
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_cache = use_cache
        super().__init__(**kwargs)
