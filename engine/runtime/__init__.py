"""The engine: requests, flows, loaded models and the thread that runs batches."""
