"""Who carries a network over ranks: DDP, or DeepSpeed."""
