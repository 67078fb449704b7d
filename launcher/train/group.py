"""Whether the ranks that were joined in a group reach each other: proved before any weights are read."""

from __future__ import annotations

import re
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.errors import ClusterError
from launcher.plan import Plan

PROOF_TIMEOUT = timedelta(seconds=120)


def prove_group(plan: Plan, hosts: tuple[str, ...], timeout: timedelta = PROOF_TIMEOUT) -> None:
    """A small all-reduce on the devices that will train. Raises ClusterError that names the ranks, and hosts, that are missing.

    A barrier over gloo comes first, on a GPU too: it is what can tell who is not there.
    """
    meeting = dist.group.WORLD if plan.layout.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    try:
        dist.monitored_barrier(meeting, timeout=timeout, wait_all_ranks=True)
        device = torch.device("cuda", torch.cuda.current_device()) if plan.layout.accelerator == "cuda" else torch.device("cpu")
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones, async_op=True).wait(timeout)
    except RuntimeError as error:
        raise ClusterError(_describe_missing(str(error), hosts), REMEDY) from error
    if int(ones.item()) != dist.get_world_size():
        raise ClusterError(f"an all-reduce of ones over {dist.get_world_size()} ranks gave {ones.item():g}", REMEDY)


REMEDY = (
    "see that every node reaches every other on all ports (firewalls, MTU), and what the ranks' logs say; "
    "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are set to the interface with the node's Ray address"
)


def _describe_missing(text: str, hosts: tuple[str, ...]) -> str:
    """ "Ranks 1, 2 failed to pass monitoredBarrier in 100 ms" in our words; what else went wrong as it was said."""
    found = re.search(r"Ranks? ([\d, ]+) failed to (?:pass|respond|reach)", text)
    first = next(iter(text.strip().splitlines()), "")
    if not found:
        return f"the first all-reduce of the group failed: {first}"
    missing = [int(rank) for rank in found[1].replace(" ", "").strip(",").split(",")]
    names = ", ".join(f"rank {rank}" + (f" on {hosts[rank]}" if rank < len(hosts) else "") for rank in missing)
    return f"{names} did not take part in the first meeting of the group"
