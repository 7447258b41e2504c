"""The Open Inference Protocol v2: tensors by model name, whatever carries them."""
