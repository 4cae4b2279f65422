"""What a traced step has captured from Python, and when it has to be traced anew."""
