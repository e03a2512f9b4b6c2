"""What each process of a data-parallel run does: `accelerate launch ... -m support.dataset_ranks FOLDER`.

With `KILL_RANK=r`, rank r kills itself once some rows are in the folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch

from support.dataset_job import rows_kept, run


def main() -> None:
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    torch.set_num_threads(1)

    def kill() -> None:
        while rows_kept(folder) < 20:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.get("KILL_RANK") == str(rank):
        threading.Thread(target=kill, daemon=True).start()
    done = run({"folder": folder, "rows": 150, "shard_rows": None, "new": 12, "rank": None, "world_size": None})
    print(
        f"rank {rank} of {os.environ['WORLD_SIZE']} has {len(done)} rows, the last one {done[-1]['number']}",
        flush=True,
    )


if __name__ == "__main__":
    main()
