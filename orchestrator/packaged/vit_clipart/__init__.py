"""The packaged ViT teacher: weights, model card and training script."""
