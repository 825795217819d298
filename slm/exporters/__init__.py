"""What makes ONNX models out of checkpoints, and the checks that every export has to pass."""
