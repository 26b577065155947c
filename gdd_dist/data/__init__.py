"""Order, noise, decoding, loading and augmentation of images; independent of the steps."""
