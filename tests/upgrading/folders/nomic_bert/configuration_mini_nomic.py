from transformers import GPT2Config


class MiniNomicConfig(GPT2Config):
    model_type = "mini_nomic"

    def __init__(
        self,
        prenorm=False,
        rotary_emb_fraction=0.0,
        rotary_emb_base=10_000,
        rotary_scaling_factor=None,
        qkv_proj_bias=False,
        mlp_fc1_bias=False,
        type_vocab_size=2,
        pad_vocab_size_multiple=8,
        dense_seq_output=True,
        **kwargs,
    ):
        self.prenorm = prenorm
        self.rotary_emb_fraction = rotary_emb_fraction
        self.rotary_emb_base = rotary_emb_base
        self.rotary_scaling_factor = rotary_scaling_factor
        self.qkv_proj_bias = qkv_proj_bias
        self.mlp_fc1_bias = mlp_fc1_bias
        self.type_vocab_size = type_vocab_size
        self.pad_vocab_size_multiple = pad_vocab_size_multiple
        self.dense_seq_output = dense_seq_output
        super().__init__(**kwargs)
