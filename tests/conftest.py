"""What every test shares."""

import torch

# The tensors of the tests are small: threads cost more than they bring, and the machine runs other things.
torch.set_num_threads(1)
