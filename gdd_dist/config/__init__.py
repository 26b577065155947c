"""Settings: what there is to set, presets, and how settings are read from files and the command line."""

import os

# Programs read their settings before they load torch, which reads this then: of a connection that broke it prints its C++ stack,
# where a line of ours says whose it was.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
