HARD_OPS = []
