"""Files: safe ways to open, write, replace and address them, and a format of others."""
