"""What ships inside the logged ONNX model: an MLflow pyfunc on onnxruntime-genai.

Imports nothing from the project, and needs neither torch nor transformers.
"""
