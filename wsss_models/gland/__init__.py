"""Gland segmentation from image labels: consistency correlation attention, pyramid fusion pooling, purified labels (M2)."""
