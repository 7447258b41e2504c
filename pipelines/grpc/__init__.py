"""The Open Inference Protocol v2 over gRPC, and gRPC's own health protocol."""
