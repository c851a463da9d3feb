"""How each peer is told to train: a module a peer, run by its own Python. They import nothing of ours but each other."""
