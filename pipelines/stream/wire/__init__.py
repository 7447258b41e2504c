"""What lies on the wire: batches of records."""
