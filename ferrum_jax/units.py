"""Formats numbers. It imports nothing, so that the command line can use it before JAX is imported."""


def readable_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def shown_dtype(name: str) -> str:
    """The name of a dtype for users."""
    return "fp8" if name == "float8_e4m3fn" else name
