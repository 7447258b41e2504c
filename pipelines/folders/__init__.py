"""Folders of items: batch runs that can be killed and go on."""
