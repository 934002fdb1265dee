"""Settings of the whole suite."""

import torch

# two test processes share two cores, and the tests' tensors are tiny
torch.set_num_threads(1)
