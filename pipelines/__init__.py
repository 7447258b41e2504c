"""Plinth."""
