def round_up(size: int, to: int) -> int:
    return -(-size // to) * to
