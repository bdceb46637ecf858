"""Training: the sample text, tokenizers made from text, and an explicit training loop on accelerate."""
