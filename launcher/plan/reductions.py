"""What torch's sums over rows take beside their result on CUDA (torch 2.13, aten/src/ATen/native/cuda/Reduce.cuh).

A bias' or a norm's gradient is the sum of a matrix over its rows. Where the rows are many, several blocks of threads share a column, and leave
their parts in a buffer: an fp32 number for each thread and each of the four columns it sums, for every column (setReduceConfig, global_memory_size).
Liger's component benchmarks of its RMSNorm on an A100 show that buffer to the byte.
"""

from __future__ import annotations

MULTIPROCESSORS = 132
"""An H100's. The buffer grows with their number, and stays below about a MiB each."""
COLUMNS_A_THREAD, WARP, THREADS, THREADS_A_MULTIPROCESSOR = 4, 32, 128, 2048
FEWEST_VALUES, MOST_VALUES = 16, 256
"""A thread sums at least and at most so many values; fewer than the most are not shared between blocks."""


def sum_of_rows_workspace(rows: int, columns: int, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Bytes of the buffer; 0 where one block sums a column alone."""
    if columns % COLUMNS_A_THREAD:
        return 0
    width = min(columns // COLUMNS_A_THREAD, WARP)
    height = THREADS // width
    values = -(-rows // height)
    blocks = -(-columns // (COLUMNS_A_THREAD * width))
    wanted = multiprocessors * (THREADS_A_MULTIPROCESSOR // THREADS)
    if values < MOST_VALUES or blocks > wanted:
        return 0
    shared = max(min(-(-wanted // blocks), -(-values // FEWEST_VALUES)), -(-values // MOST_VALUES))
    return 4 * columns * shared * width * COLUMNS_A_THREAD if shared > 1 else 0
