from .api import PAMR, PAR, par

__all__ = ["PAMR", "PAR", "par"]
