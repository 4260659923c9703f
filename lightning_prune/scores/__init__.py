"""How much each unit matters, and the regulariser that makes it matter less."""
