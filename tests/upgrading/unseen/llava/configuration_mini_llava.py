from transformers import CONFIG_MAPPING, PretrainedConfig


class MiniVisionConfig(PretrainedConfig):
    model_type = "mini_llava_vision"

    def __init__(self, hidden_size=16, image_size=8, patch_size=4, **kwargs):
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)


class MiniLlavaConfig(PretrainedConfig):
    model_type = "mini_llava"
    is_composition = True

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        ignore_index=-100,
        image_token_index=63,
        projector_hidden_act="gelu",
        vocab_size=64,
        **kwargs,
    ):
        self.ignore_index = ignore_index
        self.image_token_index = image_token_index
        self.projector_hidden_act = projector_hidden_act
        self.vocab_size = vocab_size
        self.vision_config = (
            MiniVisionConfig(**vision_config)
            if isinstance(vision_config, dict)
            else (vision_config or MiniVisionConfig())
        )
        if isinstance(text_config, dict):
            text_config["model_type"] = text_config["model_type"] if "model_type" in text_config else "llama"
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
            self.vocab_size = text_config.vocab_size
        elif text_config is None:
            text_config = CONFIG_MAPPING["llama"]()
        self.text_config = text_config
        super().__init__(**kwargs)
