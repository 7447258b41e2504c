"""Making a model's weights smaller: three algorithms that compose, and the file they end in."""
