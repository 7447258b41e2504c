"""Which devices there are: rows of data on torch.accelerator."""
