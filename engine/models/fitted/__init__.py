"""Fitted estimators of other libraries, and what float32 makes of their trees."""
