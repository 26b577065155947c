"""Settings, their bounds and presets, and how they are read from files and the command line."""

import os

# Set before torch is imported, which reads it then. Otherwise torch prints C++ stacks of broken connections, for which this
# package prints one clear line.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
