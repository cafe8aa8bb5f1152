"""Score, rank, recommend, evaluate, explain."""
