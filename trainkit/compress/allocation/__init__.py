"""How a budget of sparsity, bits or bytes is spread over the layers (EvoPress)."""
