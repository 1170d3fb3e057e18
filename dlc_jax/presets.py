"""What several configuration files share, and what runs of them are called."""

from dlc_jax.cli.presets import DEFAULT_MODEL, LANGUAGE_MODELS, paper_instructions, run_name

__all__ = ["DEFAULT_MODEL", "LANGUAGE_MODELS", "paper_instructions", "run_name"]
