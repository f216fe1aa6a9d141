"""M4: one-stage segmentation of Pascal VOC from image labels, with a frozen UniCL encoder and affinities of its blocks."""
