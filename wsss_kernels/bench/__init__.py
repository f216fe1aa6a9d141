"""`python -m wsss_kernels.bench`: what the operators gain on this machine.

Every case comes from an operator's spec. A figure is printed only where the result is right: ours is held to the
tolerance rule against the float64 reference, every baseline must agree with it too. Ours and the baselines run in turn,
so that both meet the same neighbours on a shared machine; medians with the 20th and 80th percentile are reported.

In a clone the baselines are those of `benchmarks/baselines` (the released algorithms in eager PyTorch); with an installed
package alone they are the operators' plain PyTorch references.
"""

from .row import Row, case_mode
from .sweep import exponent
from .table import append, headline, reached, read, slug, text
from .timing import bind, measure

__all__ = ["Row", "append", "bind", "case_mode", "exponent", "headline", "measure", "reached", "read", "slug", "text"]
