"""One line per operator folder: its public names. Everything else finds an operator because its folder exists."""

from .par import PAMR as PAMR, PAR as PAR, par as par

__all__ = sorted(name for name, value in globals().items() if getattr(value, "__module__", "").startswith(f"{__name__}."))
