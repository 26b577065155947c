"""The product: a generator that draws images, and the card of an exported set."""
