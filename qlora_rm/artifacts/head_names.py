"""Names of the score head's weights in the complete models that this project writes."""

HEAD, HEAD_BIAS = "score.weight", "score.bias"
