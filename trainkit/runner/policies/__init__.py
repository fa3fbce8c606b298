"""How much to draft in each round, decided while decoding."""
