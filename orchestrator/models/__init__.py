"""Teachers and students by name: `timm/<name>`, `open_clip/<name>`, `local:<path>`, `packaged/<name>`."""
