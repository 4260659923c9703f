"""``lightning-prune tune`` in a process of its own, with words from the command line, on one thread."""

import signal
import sys
import warnings

import torch

from lightning_prune.commands.entry import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv[0] = "lightning-prune"
    main()
