"""LoRA on gpt-oss through PEFT: attention by its own layers, stacked experts by ours, saved as PEFT saves them."""
