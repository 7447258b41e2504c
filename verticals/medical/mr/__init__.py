"""MR: brain tissue of T1-weighted heads."""
