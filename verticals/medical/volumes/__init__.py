"""Volumes in patient space: orientation, resampling, display windows."""
