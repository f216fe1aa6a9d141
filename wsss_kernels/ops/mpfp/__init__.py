from .api import MPFP, mpfp

__all__ = ["MPFP", "mpfp"]
