"""Configuration of MyBert. Copied as it is into Hub repos: imports transformers and its siblings `base` and `compat` only."""

from typing import Any

from transformers.activations import ACT2FN

from .base import MyPretrainedConfig, Plan
from .compat import TP_EMBEDDING_ROWWISE


class MyBertConfig(MyPretrainedConfig):
    """BERT with switches. The defaults are stock BERT (base, uncased) exactly; each modification is one named field.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of the model.
        num_hidden_layers: number of layers.
        num_attention_heads: heads per layer, a divisor of `hidden_size`.
        intermediate_size: width of the MLP.
        hidden_act: a name from `transformers.activations.ACT2FN`.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout after each sub-layer, and on attention weights.
        max_position_embeddings: rows of the position table, which is also the longest input.
        type_vocab_size: number of segment ids (`token_type_ids`).
        initializer_range: standard deviation of new weights.
        layer_norm_eps: added to the variance in LayerNorm.
        classifier_dropout: dropout before the classifier. Default: `hidden_dropout_prob`.
        pooling: how one vector per sequence (`pooler_output`) is made: `pooler` (stock: first token through a dense
            layer and tanh), `cls` (first token as it is), `mean` or `max` over the tokens (arXiv 1908.10084), or
            `attention` (a learned linear score per token, after arXiv 1703.03130).
        layer_mix: if set, the heads read a learned softmax mix of the last `layer_mix` layers instead of the last
            layer (ELMo, arXiv 1802.05365); `last_hidden_state` is that mix.
        label_smoothing: in [0, 1), for classification (arXiv 1512.00567).
        class_weights: one positive weight per label in the classification loss; for multi-label problems the weight
            of the positive examples.
        focal_gamma: exponent of the focal loss, 0 for plain cross-entropy (arXiv 1708.02002).
        multi_sample_dropout: average the training loss over so many dropout masks of the classifier's input
            (arXiv 1905.09788).

    Raises:
        ValueError: a field has an impossible value; the message names field and value.
    """

    model_type = "mybert"
    AUTO_MAP = {
        "AutoConfig": "configuration_mybert.MyBertConfig",
        "AutoModel": "modeling_mybert.MyBertModel",
        "AutoModelForSequenceClassification": "modeling_mybert.MyBertForSequenceClassification",
        "AutoModelForMaskedLM": "modeling_mybert.MyBertForMaskedLM",
        "AutoModelForTokenClassification": "modeling_mybert.MyBertForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_mybert.MyBertForQuestionAnswering",
    }
    CHOICES = {"pooling": ("pooler", "cls", "mean", "max", "attention")}
    # tensor parallelism splits projections by outputs (`colwise`) or by inputs (`rowwise`), token embeddings by tokens
    base_model_tp_plan = {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
        **({"embeddings.word_embeddings": TP_EMBEDDING_ROWWISE} if TP_EMBEDDING_ROWWISE else {}),
    }
    # FSDP2: modules that are gathered as one unit, and whether the full weights are freed after use
    base_model_fsdp_plan = {
        "embeddings.word_embeddings": "free_full_weight",
        "encoder.layer.*": "free_full_weight",
    }

    @Plan
    def base_model_pp_plan(self) -> dict[str, tuple[list[str], list[str]]]:
        """The modules that pipeline parallelism distributes, in order, with the inputs and outputs of each."""
        mix = {"layer_mix": (["layers"], ["hidden_states"])}
        return {
            "embeddings": (["input_ids", "token_type_ids", "position_ids", "inputs_embeds"], ["hidden_states"]),
            "encoder.layer": (["hidden_states", "attention_mask"], ["hidden_states", "attentions"]),
            **(mix if self.layer_mix else {}),
            "pooler": (["hidden_states", "token_mask"], ["pooler_output"]),
        }

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        classifier_dropout: float | None = None,
        pooling: str = "pooler",
        layer_mix: int | None = None,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        focal_gamma: float = 0.0,
        multi_sample_dropout: int = 1,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = 0,
        auto_map: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        self.pooling = pooling
        self.layer_mix = layer_mix
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma
        self.multi_sample_dropout = multi_sample_dropout

        super().__init__(**kwargs)

        self._finish_init(auto_map, tie_word_embeddings=tie_word_embeddings, pad_token_id=pad_token_id)

    def check_consistency(self) -> None:
        super().check_consistency()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size={self.hidden_size} is not divisible by "
                f"num_attention_heads={self.num_attention_heads}: change one of them"
            )
        self._require_heads_per_process("num_attention_heads")
        # features that a stock BERT's config.json may request and this model lacks
        positions = getattr(self, "position_embedding_type", None) or "absolute"
        self._require(
            positions == "absolute", "position_embedding_type", "'absolute': relative positions are not supported"
        )
        self._require(not getattr(self, "is_decoder", False), "is_decoder", "False: MyBert is an encoder")
        self._require(not getattr(self, "add_cross_attention", False), "add_cross_attention", "False: not supported")

        self._require(self.hidden_act in ACT2FN, "hidden_act", "a key of transformers' ACT2FN")
        mix = self.layer_mix
        at_most = f"None or a number of layers, 1 to num_hidden_layers={self.num_hidden_layers}"
        counts = isinstance(mix, int) and not isinstance(mix, bool)  # True would pass as 1
        self._require(mix is None or (counts and 1 <= mix <= self.num_hidden_layers), "layer_mix", at_most)
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "at least 0 and below 1")
        self._require(self.focal_gamma >= 0, "focal_gamma", "0 or more")
        self._require(self.multi_sample_dropout >= 1, "multi_sample_dropout", "1 or more")
        if self.class_weights is not None:
            fits = len(self.class_weights) == self.num_labels and min(self.class_weights, default=0) > 0
            self._require(fits, "class_weights", f"one positive number for each of {self.num_labels} labels")
        if self.problem_type == "regression" or (self.problem_type is None and self.num_labels == 1):
            for field, off in (("label_smoothing", 0), ("class_weights", None), ("focal_gamma", 0)):
                self._require(getattr(self, field) == off, field, f"{off} for problem_type='regression'")


MyBertConfig.register_for_auto_class()
