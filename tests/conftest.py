"""What every test shares: nothing is downloaded, threads do not multiply, and the replay script can be imported."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(2)
sys.path.insert(0, str(Path(__file__).parent))
