"""Names of transformers that some supported releases lack, found by comparing the releases.

The table has only names that custom code is known to import; for an installed release its source is read instead. The
compared releases are 4.56, 4.57, 5.0, 5.2, 5.3, 5.4, 5.10 and 5.23.
"""

Minor = tuple[int, int]

_ALWAYS = ((4, 56), (5, 99))  # removed before the first supported release
_FROM_5 = ((5, 0), (5, 99))
_BEFORE_5 = ((4, 56), (4, 57))
_TABLE: list[tuple[tuple[Minor, Minor], str, str]] = [
    (
        _ALWAYS,
        "modeling_utils",
        "find_pruneable_heads_and_indices prune_linear_layer PoolerAnswerClass SequenceSummary SQuADHead",
    ),
    (_ALWAYS, "pytorch_utils", "is_torch_greater_or_equal_than_1_9 is_torch_greater_or_equal_than_1_10"),
    (_ALWAYS, "utils", "LossKwargs"),
    (_ALWAYS, "cache_utils", "MambaCache QuantizedCacheConfig StaticCacheConfig"),
    (_ALWAYS, "models.llama.modeling_llama", "LlamaFlashAttention2 LlamaSdpaAttention LLAMA_ATTENTION_CLASSES"),
    (_ALWAYS, "models.llama.modeling_llama", "LlamaLinearScalingRotaryEmbedding LlamaDynamicNTKScalingRotaryEmbedding"),
    (_ALWAYS, "models.gpt2.modeling_gpt2", "GPT2FlashAttention2 GPT2SdpaAttention GPT2_ATTENTION_CLASSES"),
    (_ALWAYS, "deepspeed", ""),
    (_FROM_5, "onnx", ""),
    (_FROM_5, "modeling_tf_utils", ""),
    (_FROM_5, "modeling_flax_utils", ""),
    (_FROM_5, "utils.fx", ""),
    (_FROM_5, "utils.model_parallel_utils", ""),
    (_FROM_5, "modeling_utils", "load_sharded_checkpoint no_init_weights get_parameter_device get_parameter_dtype"),
    (_FROM_5, "modeling_utils", "is_torch_fx_proxy is_peft_available TF_WEIGHTS_NAME TF2_WEIGHTS_NAME"),
    (_FROM_5, "utils", "is_torch_fx_available is_tf_available is_flax_available is_tf_tensor is_torch_bf16_available"),
    (
        _FROM_5,
        "utils",
        "is_safetensors_available TF2_WEIGHTS_NAME TF_WEIGHTS_NAME FLAX_WEIGHTS_NAME TRANSFORMERS_CACHE",
    ),
    (_FROM_5, "utils.import_utils", "is_torch_fx_available is_tf_available is_flax_available is_safetensors_available"),
    (_FROM_5, "utils.generic", "is_tf_tensor is_jax_tensor infer_framework"),
    (_FROM_5, "pytorch_utils", "find_pruneable_heads_and_indices prune_conv1d_layer prune_layer"),
    (_FROM_5, "cache_utils", "HybridCache HybridChunkedCache OffloadedCache OffloadedStaticCache SinkCache"),
    (_FROM_5, "cache_utils", "HQQQuantizedCache QuantoQuantizedCache SlidingWindowLayer ChunkedSlidingLayer"),
    (_FROM_5, "generation.utils", "GreedySearchOutput SampleOutput BeamSearchOutput BeamSampleOutput"),
    (_FROM_5, "generation.utils", "GreedySearchDecoderOnlyOutput SampleDecoderOnlyOutput ContrastiveSearchOutput"),
    (_FROM_5, "tokenization_utils_base", "SpecialTokensMixin"),
    (_FROM_5, "modeling_rope_utils", "_compute_default_rope_parameters ROPE_VALIDATION_FUNCTIONS"),
    (_FROM_5, "models.bert.modeling_bert", "BERT_SELF_ATTENTION_CLASSES BertSdpaSelfAttention load_tf_weights_in_bert"),
    (_FROM_5, "models.gpt2.modeling_gpt2", "load_tf_weights_in_gpt2 PARALLELIZE_DOCSTRING DEPARALLELIZE_DOCSTRING"),
    (_FROM_5, "processing_utils", "CommonKwargs"),
    (((4, 57), (5, 99)), "utils", "cached_property send_example_telemetry"),
    (((5, 2), (5, 99)), "utils.backbone_utils", "BackboneType load_backbone verify_backbone_config_arguments"),
    (((5, 2), (5, 99)), "pytorch_utils", "isin_mps_friendly"),
    (((5, 23), (5, 99)), "modeling_utils", "ALL_PARALLEL_STYLES"),
    (_BEFORE_5, "initialization", ""),
    (_BEFORE_5, "configuration_utils", "PreTrainedConfig"),
    (_BEFORE_5, "modeling_utils", "PreTrainedConfig"),
    (_BEFORE_5, "masking_utils", "create_bidirectional_mask bidirectional_mask_function"),
    (_BEFORE_5, "modeling_rope_utils", "RopeParameters"),
    (_BEFORE_5, "utils.generic", "maybe_autocast is_flash_attention_requested"),
    (_BEFORE_5, "models.bert.modeling_bert", "eager_attention_forward"),
    (((4, 56), (5, 0)), "utils.output_capturing", ""),
    (((4, 56), (5, 0)), "masking_utils", "create_bidirectional_sliding_window_mask"),
    (((4, 56), (5, 10)), "modeling_utils", "slice_logits_to_keep"),
]
# (module, name) → first and last release without it; the name "" means the entire module
GONE: dict[tuple[str, str], tuple[Minor, Minor]] = {
    (f"transformers.{module}", name): span for span, module, names in _TABLE for name in names.split() or [""]
}

# Methods and attributes of transformers' caches, configs and models that are not in every supported release
# name → first and last release without it, what it belongs to, and what to use instead
ATTRIBUTES: dict[str, tuple[Minor, Minor, str, str]] = {
    "get_usable_length": ((4, 56), (5, 99), "caches", "get_seq_length()"),
    "get_max_length": ((4, 56), (5, 10), "caches", "config.max_position_embeddings"),
    "get_max_cache_shape": ((5, 23), (5, 99), "caches", "the length of the mask"),
    "seen_tokens": ((4, 56), (5, 99), "caches", "get_seq_length()"),
    "from_legacy_cache": ((5, 0), (5, 99), "caches", "DynamicCache(config=self.config)"),
    "to_legacy_cache": ((5, 0), (5, 99), "caches", "the cache itself"),
    "key_cache": ((4, 56), (5, 99), "caches", "cache.layers[i].keys"),
    "value_cache": ((4, 56), (5, 99), "caches", "cache.layers[i].values"),
    "get_head_mask": ((5, 0), (5, 99), "models", "no head mask"),
    "invert_attention_mask": ((5, 23), (5, 99), "models", "transformers.masking_utils"),
    "get_extended_attention_mask": ((5, 23), (5, 99), "models", "transformers.masking_utils"),
}
