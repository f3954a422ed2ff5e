"""The second engine: training artifacts made and run by onnxruntime-training, see ``docs/adr/0006``."""
