"""Jobs: one config and one main each."""
