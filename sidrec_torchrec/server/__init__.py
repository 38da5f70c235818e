"""A small server of an exported ranker: JSON in, probabilities out. Needs the extra ``server``, and no TorchRec."""
