"""DuSSS (M1): a vision-language model trained on uncertain similarities guides semi-supervised segmentation."""
