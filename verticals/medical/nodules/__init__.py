"""Candidates for lung nodules, and the network that ranks them."""
