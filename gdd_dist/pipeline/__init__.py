"""From one step to the next: fingerprints, preflight checks, inputs, and the run itself."""
