"""Progress bars: widgets in JupyterLab; text in a terminal, also for a kernel of a batch run."""

import os

BATCH = "ADVKIP_BATCH"
"""Environment variable that `advkip.run` sets for the kernels it starts."""

if os.environ.get(BATCH):
    from tqdm.std import tqdm
else:
    from tqdm.auto import tqdm

__all__ = ["BATCH", "tqdm"]
