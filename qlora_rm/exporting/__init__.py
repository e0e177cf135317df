"""Export: a whole model or adapter as each reader of reward models wants it, checked against how that reader scores."""
