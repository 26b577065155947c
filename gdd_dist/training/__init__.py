"""What the steps that train share: context, losses, the training loop, adversaries, drawing."""
