"""`python -m launcher.job.tell SUBMISSION SECONDS`, run on the cluster: tell a submission's driver how long it may take to stop."""

from __future__ import annotations

import sys


def main() -> None:
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    submission, grace_s = sys.argv[1:]
    ray.init(log_to_driver=False)
    _internal_kv_put(f"lepton-launch/stop/{submission}".encode(), grace_s.encode())
    ray.shutdown()


if __name__ == "__main__":
    main()
