"""SIDE: modules that read SIDs in place of embedding tables."""
