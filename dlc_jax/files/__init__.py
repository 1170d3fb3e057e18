"""Files read with care and written whole: JSON, NumPy, Arrow, images; no notion of a run."""
