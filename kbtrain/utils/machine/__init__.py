"""What a run needs of the machine: processes, ports, signals, memory and devices."""
