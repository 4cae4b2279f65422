"""Callbacks of Keras and Transformers as those of kbtrain."""
