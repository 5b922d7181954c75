"""Generation: one token after the other, with what the gate made of each."""
