"""Quantizers, and the codec that turns packed SIDs back into vectors."""
