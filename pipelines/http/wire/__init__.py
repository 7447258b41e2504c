"""HTTP/1.1 over sockets: framing, connections, admission. Knows no records, no FastAPI."""
