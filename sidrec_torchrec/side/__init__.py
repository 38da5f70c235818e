"""SIDE: modules that read SIDs where embedding tables stood."""
