"""Bundles for the engine ``ort-training``: the model's forward pass, and what onnxruntime-training makes of it."""
