"""State, step, optimisers, checkpoints, writers and the loop."""
