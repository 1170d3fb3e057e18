"""The stages of a run, what they share, and the pipeline that calls them in order."""
