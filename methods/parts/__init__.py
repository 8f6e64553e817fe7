"""Pieces of networks that a deployed student may be made of: torch and timm only, copied into an export as they are."""
