"""What a network costs: parameters, multiply-accumulates, bytes, time."""
