"""What a user takes away: a generator that draws, and the card of an exported set."""
