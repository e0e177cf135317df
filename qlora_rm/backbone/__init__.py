"""The backbone: a causal LM or encoder in 4 bit, its adapter and its score head."""
