"""The Hugging Face Hub: what a run pushes to it, when, and resuming from what was pushed."""
