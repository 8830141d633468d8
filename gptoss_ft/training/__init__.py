"""transformers' Trainer with a chunked loss, an audit of the gradients, and a run folder."""
