"""What knows Lightning: the callback and each question it puts to a Trainer."""
