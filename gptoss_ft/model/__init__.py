"""gpt-oss checkpoints: shapes and names, the three published layouts, reading and writing."""
