"""What ships inside the logged ONNX models: MLflow pyfuncs on onnxruntime-genai.

Imports nothing from the project, and needs neither torch nor transformers.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
