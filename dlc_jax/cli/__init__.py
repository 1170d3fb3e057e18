"""The commands behind `python -m dlc_jax.main`, `.check` and `.lm_eval`."""
