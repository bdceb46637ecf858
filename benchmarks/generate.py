"""Generating and prefilling with GPT-2's geometry (124M, random weights): MyGPT2 beside stock GPT-2, the same weights.

    python benchmarks/generate.py [--short] [--threads N] [--json FILE] [--figure FILE]

Greedy decoding of 128 tokens through `generate`, batch 1 and 8, must give the same tokens. Prefill: 8 prompts of 512
tokens, logits of the last one. The floor is the bare matrix products, so in decoding each weight read once per token.
Then the same model in int8 by `mymodels.quantize`, with states of 16 and of 8 bits, beside stock in float32, with what is
lost: the KL divergence of the predictions, and the held-out loss of a small model trained here. The figure: the ratios.
"""

import copy
import sys
import tempfile
from collections.abc import Callable

import pairs
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mymodels import MyGPT2Config, MyGPT2ForCausalLM, load_sample_text, quantize
from mymodels.demo import batches, windows
from mymodels.training.evaluation import evaluate
from mymodels.training.loop import train
from mymodels.training.tokenizers import train_gpt2_tokenizer

QUANTISED = {"int8": 16, "int8, states of 8 bits": 8}


def models(**changes: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and the stock one, with the same random weights, which never stop by themselves."""
    stock = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **changes)).eval()
    return ours_from(stock), stock


def ours_from(stock: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        return MyGPT2ForCausalLM.from_pretrained(folder).eval()


def quantised(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    return quantize(copy.deepcopy(model), activation_bits=bits)


def generating(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> Callable[[], torch.Tensor]:
    given = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    return torch.inference_mode()(lambda: model.generate(prompt, max_new_tokens=tokens, **given))


def bare_steps(model: PreTrainedModel, rows: int, tokens: int) -> Callable[[], None]:
    """The matrix products of one step, `tokens` times."""
    with torch.no_grad():
        cache = model(torch.ones(rows, 16, dtype=torch.long), use_cache=True).past_key_values
        step = pairs.bare_products(lambda: model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache))
    return lambda: [step() for _ in range(tokens)]


def prefilling(model: PreTrainedModel, prompt: torch.Tensor) -> Callable[[], torch.Tensor]:
    return torch.inference_mode()(lambda: model(prompt, logits_to_keep=1).logits)


def losses_of_quantising(ours: PreTrainedModel, short: bool) -> dict[str, dict[str, float]]:
    """What each way loses: on random weights the KL divergence, on a small trained model the held-out loss."""
    ids = torch.randint(50257, (2, 64))
    training, held_out = load_sample_text("train"), load_sample_text("held_out")
    tokenizer = train_gpt2_tokenizer([d.text for d in training], vocab_size=1024, model_max_length=128)
    rows = [windows(tokenizer, documents) for documents in (training, held_out)]
    small = MyGPT2Config(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.06,
    )  # fmt: skip
    trained = MyGPT2ForCausalLM(small)
    train(trained, rows[0], num_train_epochs=6, max_steps=60 if short else -1, per_device_train_batch_size=8, learning_rate=4e-3,
          description="a small model")  # fmt: skip
    test = batches(rows[1])
    before = evaluate(trained.eval(), test)[0]
    found = {}
    for name, bits in QUANTISED.items():
        with torch.inference_mode():
            theirs, mine = (m(ids).logits.double().log_softmax(-1) for m in (ours, quantised(ours, bits)))
            kl = (theirs.exp() * (theirs - mine)).sum(-1).mean().item()
        after = evaluate(quantised(trained, bits), test)[0]
        found[name] = {"kl": kl, "held_out_before": before, "held_out_after": after}
    return found


def main() -> int:
    arguments = pairs.arguments(__doc__).parse_args()
    pairs.start(arguments)
    tokens, repeats = (16, 2) if arguments.short else (128, 5)
    ours, stock = models()
    rows = []
    prompts = {batch: torch.randint(50257, (batch, 16)) for batch in (1, 8)}
    for batch, prompt in prompts.items():
        rows.append(
            pairs.compare(
                f"generate {tokens} tokens, batch {batch}",
                generating(ours, prompt, tokens),
                generating(stock, prompt, tokens),
                repeats=repeats,
                tolerance=0,
                target=1.25 if batch == 1 else None,
                floor=bare_steps(ours, batch, tokens),
                floor_target=0.93 if batch == 1 else None,
            )
        )
    prompt = torch.randint(50257, (1 if arguments.short else 8, 512))
    floor = pairs.bare_products(prefilling(ours, prompt))
    rows.append(
        pairs.compare(
            f"prefill {len(prompt)}×512, last logits",
            prefilling(ours, prompt),
            prefilling(stock, prompt),
            repeats=repeats,
            target=1.2,
            floor=floor,
            floor_target=0.78,
        )
    )
    lost = losses_of_quantising(ours, arguments.short)
    for name, bits in QUANTISED.items():
        smaller = quantised(ours, bits)
        for batch, prompt in prompts.items():
            row = pairs.compare(
                f"generate, {name}, batch {batch}",
                generating(smaller, prompt, tokens),
                generating(stock, prompt, tokens),
                repeats=repeats,
                tolerance=None,
                target=2.5 if name == "int8" else None,
            )
            rows.append(row | lost[name])
    code = pairs.finish(rows, arguments)
    for name, found in lost.items():
        print(
            f"{name}: KL divergence {found['kl']:.1e} nats per token; held-out loss of a small trained model "
            f"{found['held_out_before']:.4f} → {found['held_out_after']:.4f}"
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
