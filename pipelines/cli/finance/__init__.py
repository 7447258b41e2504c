"""``plinth finance``: which version of the fraud model answers, and the next one."""
