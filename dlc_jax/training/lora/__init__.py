"""Fine-tuning of language models by low-rank changes, step for step as PEFT does it on torch."""
