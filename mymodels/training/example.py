"""Train a small MyGPT2 on the sample text with the loop; the run can be killed and resumed.

python -m mymodels.training.example --output_dir run
accelerate launch --config_file mymodels/training/accelerate_configs/ddp.yaml -m mymodels.training.example --output_dir run
"""

import argparse

import torch
from accelerate import PartialState

from ..models.configuration_mygpt2 import MyGPT2Config
from ..models.modeling_mygpt2 import MyGPT2ForCausalLM
from .loop import train
from .sample_text import load_sample_text
from .tokenizers import train_gpt2_tokenizer

WINDOW = 64  # tokens per example


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="gets the checkpoints")
    parser.add_argument("--resume_from_checkpoint", action="store_true", help="resume from the newest checkpoint there")
    for name, default in {
        "num_train_epochs": 2,
        "max_steps": -1,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "save_steps": 20,
        "save_total_limit": 3,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()

    texts = [document.text for document in load_sample_text("held_out")]
    tokenizer = train_gpt2_tokenizer(texts, vocab_size=512, model_max_length=WINDOW)
    ids = [token for text in texts for token in tokenizer(text, verbose=False).input_ids]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    torch.manual_seed(arguments.seed)  # the same weights on every process
    config = MyGPT2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    try:
        losses = train(MyGPT2ForCausalLM(config), dataset, **vars(arguments))
    except (OSError, ValueError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
    if PartialState().is_main_process:
        print(f"{len(losses)} steps, loss {losses[0]:.3f} → {losses[-1]:.3f}; the model is in {arguments.output_dir}")


if __name__ == "__main__":
    main()
