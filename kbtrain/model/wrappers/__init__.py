"""What stands around the calls of layers: checkpointing, NEFTune, the search for an overflow."""
