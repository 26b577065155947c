"""Settings: what there is to set, presets, and how settings are read from files and the command line."""
