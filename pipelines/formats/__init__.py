"""Message formats of others: a declared mapping to a vertical's records, and Avro beside JSON."""
