"""Operation class to dtype, and what each layer really runs."""
