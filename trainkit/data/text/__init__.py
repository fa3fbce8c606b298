"""From files to packed token rows: sources, formats, chat templates, packing."""
