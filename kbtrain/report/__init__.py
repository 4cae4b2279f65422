"""What a run is and how it ended, as plain values for every screen, page and file."""
