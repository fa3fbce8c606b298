"""Generated data sets on disk: distilled text, target features, acceptance records, and the writer they share."""
