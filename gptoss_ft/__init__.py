"""Fine-tuning for gpt-oss through packed MXFP4 experts."""

__version__ = "0.1.0"
