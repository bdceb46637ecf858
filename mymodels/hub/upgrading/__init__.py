"""Old custom code made to run on today's transformers, and proven unchanged."""
