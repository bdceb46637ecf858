from transformers import PretrainedConfig


class MiniHyenaConfig(PretrainedConfig):
    model_type = "mini_hyena"

    def __init__(self, vocab_size=46, d_model=16, d_inner=None, pad_vocab_size_multiple=2, max_seq_len=64, n_layer=2, emb_dim=5,
                 filter_order=8, hyena_order=2, short_filter_order=3, layer_norm_epsilon=1e-5, initializer_range=0.02, **kwargs):
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.d_inner = 4 * d_model if d_inner is None else d_inner
        self.max_seq_len = max_seq_len
        self.n_layer = n_layer
        self.emb_dim = emb_dim
        self.filter_order = filter_order
        self.hyena_order = hyena_order
        self.short_filter_order = short_filter_order
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        super().__init__(**kwargs)

    @classmethod
    def from_original_config(cls, config_path, **kwargs):
        import json

        with open(config_path) as f:
            return cls(**json.load(f), **kwargs)
