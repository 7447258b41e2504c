"""Histories, training and the measures of quality."""
