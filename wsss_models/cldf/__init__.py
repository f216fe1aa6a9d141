"""CLDF (M3): contrastive learning with diffusion features for weakly supervised segmentation of medical images."""
