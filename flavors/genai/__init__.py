"""An ONNX language model as an MLflow pyfunc on onnxruntime-genai: what ships inside the logged
model.

Imports nothing from the project, and needs neither torch nor transformers.
"""
