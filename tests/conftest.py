"""Settings shared by every test."""

import os

# Nothing here may reach a network; a hub that is asked by mistake should fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
