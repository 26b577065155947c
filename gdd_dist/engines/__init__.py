"""How a network is trained on several ranks: DDP, or DeepSpeed."""
