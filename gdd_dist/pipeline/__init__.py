"""From one step to the next: preflight checks, inputs, and the run itself."""
