"""What decoding costs and what drafting saves: speeds beside their baselines, acceptance beside its exact value."""
