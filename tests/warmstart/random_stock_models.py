"""Stock models with random weights in which nothing is 0 or 1, so that whatever gets lost shows."""

import torch
import transformers
from tiny import batch, largest_difference, stock_bert_config, stock_gpt2_config


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms away from 0 and 1."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


def stock_model(name: str, **changes) -> torch.nn.Module:
    config = (stock_gpt2_config if "GPT2" in name else stock_bert_config)(**changes)
    return randomised(getattr(transformers, name)(config))


def roberta(head: str, **changes):
    config = transformers.RobertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, initializer_range=0.2, layer_norm_eps=1e-5, **changes,
    )  # fmt: skip
    return randomised(getattr(transformers, head)(config))


def distilbert(head: str, **changes):
    config = transformers.DistilBertConfig(
        vocab_size=97, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, initializer_range=0.2, **changes
    )  # fmt: skip
    return randomised(getattr(transformers, head)(config))


OUTPUTS = ("last_hidden_state", "logits", "pooler_output", "start_logits", "end_logits")


@torch.no_grad()
def difference(mine, stock, padding: str = "right", inputs: dict | None = None) -> float:
    """The largest difference of all outputs that both have, on tokens that are not padding."""
    inputs = inputs or batch(padding)
    shown = inputs["attention_mask"].bool()
    ours, theirs = mine(**inputs), stock(**inputs)
    found = []
    for name in OUTPUTS:
        if theirs.get(name) is not None and ours.get(name) is not None:
            a, b = ours[name], theirs[name]
            if a.shape[:2] == shown.shape:
                a, b = a[shown], b[shown]
            found.append(largest_difference(a[..., : b.shape[-1]], b))  # a larger vocabulary: the tokens both have
    assert found
    return max(found)
