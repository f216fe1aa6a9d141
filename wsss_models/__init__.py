"""Published methods of weakly supervised semantic segmentation, composed from the operators of `wsss_kernels`."""
