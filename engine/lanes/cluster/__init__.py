"""Lanes on the machines of a Ray cluster. Only what runs in other processes imports Ray."""
