"""What `dlc_jax.main`, `.check`, `.lm_eval` and `.presets` do."""
