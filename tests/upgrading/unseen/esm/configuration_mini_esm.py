from transformers import PretrainedConfig


class MiniEsmConfig(PretrainedConfig):
    model_type = "mini_esm"

    def __init__(self, vocab_size=None, mask_token_id=None, pad_token_id=None, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                 intermediate_size=36, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, max_position_embeddings=66,
                 initializer_range=0.02, layer_norm_eps=1e-12, position_embedding_type="absolute", emb_layer_norm_before=None,
                 token_dropout=False, **kwargs):
        super().__init__(pad_token_id=pad_token_id, mask_token_id=mask_token_id, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.position_embedding_type = position_embedding_type
        self.emb_layer_norm_before = emb_layer_norm_before
        self.token_dropout = token_dropout
