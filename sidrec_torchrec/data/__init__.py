"""Reading, checking and preparing data; packed SIDs on disk."""
