"""Names of the score head in the weights of whole models that this project writes."""

HEAD, HEAD_BIAS = "score.weight", "score.bias"
