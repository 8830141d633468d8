"""The harmony chat format of gpt-oss: conversations, their token ids and what of them is trained on."""
