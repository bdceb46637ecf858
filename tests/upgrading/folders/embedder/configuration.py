"""The embedder's configuration"""
from transformers.configuration_utils import PretrainedConfig


class MiniGteConfig(PretrainedConfig):
    model_type = "mini_gte"

    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
                 hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64,
                 type_vocab_size=1, initializer_range=0.02, layer_norm_type="layer_norm", layer_norm_eps=1e-12,
                 position_embedding_type="rope", rope_theta=10000.0, rope_scaling=None, classifier_dropout=None, pack_qkv=True,
                 unpad_inputs=False, use_memory_efficient_attention=False, logn_attention_scale=False, pooling="mean",
                 num_latents=4, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_type = layer_norm_type
        self.layer_norm_eps = layer_norm_eps
        self.position_embedding_type = position_embedding_type
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.classifier_dropout = classifier_dropout
        self.pack_qkv = pack_qkv
        self.unpad_inputs = unpad_inputs
        self.use_memory_efficient_attention = use_memory_efficient_attention
        self.logn_attention_scale = logn_attention_scale
        self.pooling = pooling
        self.num_latents = num_latents
