"""Shared code of the steps that train: context, losses, the training loop, adversaries, drawing."""
