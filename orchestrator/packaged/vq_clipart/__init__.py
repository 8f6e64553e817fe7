"""The packaged upstream package: codes of clip art and emoji, and their prior."""
