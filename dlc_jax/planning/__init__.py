"""What a run would take, from shapes alone."""
