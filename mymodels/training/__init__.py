"""Training: data sets, tokenizers, fine-tuning on transformers' Trainer, and a training loop on accelerate."""
