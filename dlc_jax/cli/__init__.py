"""What `dlc_jax.main` and `.check` do."""
