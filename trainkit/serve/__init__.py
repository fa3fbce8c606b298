"""`trainkit serve`: an OpenAI-compatible server over one decoding session, to try a drafter with any OpenAI client."""
