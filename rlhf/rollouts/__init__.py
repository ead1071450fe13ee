"""What the controller keeps of rollouts besides their tokens."""
