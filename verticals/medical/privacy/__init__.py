"""Copies of images without what says whose they are."""
