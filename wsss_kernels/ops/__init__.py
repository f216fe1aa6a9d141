"""One line per operator folder: its public names. Everything else finds an operator because its folder exists."""

from .affinity import (
    RefiningMap as RefiningMap,
    affinity_deviation as affinity_deviation,
    cosine_affinity as cosine_affinity,
    refining_map as refining_map,
    sigmoid_affinity as sigmoid_affinity,
)
from .affinity_loss import affinity_loss as affinity_loss
from .box_mask import box_mask as box_mask, connected_components as connected_components
from .cam import fuse_cams as fuse_cams, normalize_cam as normalize_cam
from .contrastive import info_nce as info_nce, supervised_contrastive_loss as supervised_contrastive_loss
from .criss_cross import CrissCrossAttention as CrissCrossAttention, criss_cross_attention as criss_cross_attention
from .kmeans import kmeans as kmeans
from .mpfp import MPFP as MPFP, mpfp as mpfp
from .par import PAMR as PAMR, PAR as PAR, par as par
from .purified_label import purified_label_loss as purified_label_loss
from .random_walk import affinity_random_walk as affinity_random_walk, random_walk as random_walk
from .similarity import text_similarity as text_similarity, text_similarity_pool as text_similarity_pool
from .sinkhorn import sinkhorn as sinkhorn, sinkhorn_scaling as sinkhorn_scaling
from .wasserstein import (
    uncertainty_info_nce as uncertainty_info_nce,
    uncertainty_similarity as uncertainty_similarity,
    wasserstein2 as wasserstein2,
)
from .window_attention import (
    CrossAttentionExchange as CrossAttentionExchange,
    exchange_attention as exchange_attention,
    window_attention as window_attention,
)

__all__ = sorted(name for name, value in globals().items() if getattr(value, "__module__", "").startswith(f"{__name__}."))
