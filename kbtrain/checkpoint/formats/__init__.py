"""Files that other programs read: those of Keras, safetensors, and models for serving."""
