"""Other packages: which are there, how they are imported, and the private parts of Keras in use."""
