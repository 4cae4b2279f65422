"""PyTorch: a train step recorded once and run as one program."""
