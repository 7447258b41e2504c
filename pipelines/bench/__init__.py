"""``plinth benchmark``: load, search for the highest rate, report."""
