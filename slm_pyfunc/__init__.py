"""What ships inside the logged ONNX models: MLflow pyfuncs on onnxruntime-genai.

It imports nothing from the project, and needs neither torch nor transformers. Its imports are
relative, because each logged model ships it under a name of its own (steps/log_pyfunc.py).
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is imported
