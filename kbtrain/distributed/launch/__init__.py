"""What ``kbtrain launch`` is made of: the processes of a machine, and where machines meet."""
