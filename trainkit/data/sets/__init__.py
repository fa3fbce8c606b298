"""Generated data sets on disk: distilled answers, target features, acceptance records."""
