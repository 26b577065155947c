"""Order, noise, decoding, loading and augmentation of images; knows nothing of steps."""
