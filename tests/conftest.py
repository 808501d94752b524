"""One thread: the tensors of the tests are small, and the machine may run other tests beside these."""

import torch

torch.set_num_threads(1)
