"""What all optimizers share: state, parameter groups, weight decay, precision, averaging."""
