"""Weakly supervised OCT segmentation with structural and textual guidance (M0)."""
