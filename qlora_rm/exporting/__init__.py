"""Export a full model or an adapter in the layout that each consumer needs, checked against how that consumer scores."""
