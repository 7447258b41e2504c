"""What people who look at alerts ask for: case files, labels, other thresholds."""
