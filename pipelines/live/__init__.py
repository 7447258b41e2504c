"""What changes while work goes on: models, and tables of verticals."""
