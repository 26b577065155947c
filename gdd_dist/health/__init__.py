"""What `doctor` tries on this machine."""
