from transformers import PretrainedConfig


class MiniGLMConfig(PretrainedConfig):
    model_type = "mini_chatglm"

    def __init__(
        self,
        num_layers=2,
        padded_vocab_size=64,
        hidden_size=32,
        ffn_hidden_size=48,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_group_num=2,
        seq_length=128,
        layernorm_epsilon=1e-5,
        add_qkv_bias=True,
        apply_query_key_layer_scaling=True,
        attention_softmax_in_fp32=True,
        fp32_residual_connection=False,
        rmsnorm=True,
        **kwargs,
    ):
        self.num_layers = num_layers
        self.vocab_size = padded_vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.kv_channels = kv_channels
        self.num_attention_heads = num_attention_heads
        self.multi_query_group_num = multi_query_group_num
        self.seq_length = seq_length
        self.layernorm_epsilon = layernorm_epsilon
        self.add_qkv_bias = add_qkv_bias
        self.apply_query_key_layer_scaling = apply_query_key_layer_scaling
        self.attention_softmax_in_fp32 = attention_softmax_in_fp32
        self.fp32_residual_connection = fp32_residual_connection
        self.rmsnorm = rmsnorm
        super().__init__(**kwargs)
