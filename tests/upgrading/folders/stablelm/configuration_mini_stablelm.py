from transformers import PretrainedConfig


class MiniStableLMEpochConfig(PretrainedConfig):
    model_type = "mini_stablelm_epoch"

    def __init__(
        self,
        vocab_size=66,
        intermediate_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        rope_pct=0.5,
        rope_theta=1000,
        rope_scaling=None,
        initializer_range=0.02,
        norm_eps=1.0e-5,
        tie_word_embeddings=False,
        **kwargs,
    ):
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.intermediate_size = intermediate_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.initializer_range = initializer_range
        self.norm_eps = norm_eps
        self.rope_pct = rope_pct
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
