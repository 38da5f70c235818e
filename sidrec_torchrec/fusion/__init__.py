"""VQ Fusion, the tokenizer: items to SIDs."""
