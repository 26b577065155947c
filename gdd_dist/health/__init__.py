"""The checks that `doctor` makes on this machine."""
