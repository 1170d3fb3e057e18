"""A work directory: names and formats in it, what is done in it, its lock, its copy in a bucket."""
