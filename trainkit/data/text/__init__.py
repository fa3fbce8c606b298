"""From files to packed rows of tokens: sources, row formats, chat templates, packing."""
