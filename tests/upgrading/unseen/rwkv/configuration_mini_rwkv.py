from transformers import PretrainedConfig


class MiniRwkvConfig(PretrainedConfig):
    model_type = "mini_rwkv"
    attribute_map = {"max_position_embeddings": "context_length"}

    def __init__(
        self,
        vocab_size=58,
        context_length=64,
        hidden_size=16,
        num_hidden_layers=2,
        rescale_every=0,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.rescale_every = rescale_every
        self.use_cache = use_cache
        super().__init__(**kwargs)
