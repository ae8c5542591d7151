"""Transfer: semantic segmentation with a trained backbone."""
