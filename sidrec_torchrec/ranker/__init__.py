"""The long-sequence ranker: arms, readers, the model, serving."""
