"""MXFP4, the 4-bit floating-point block format of gpt-oss's expert weights (OCP Microscaling Formats v1.0)."""
