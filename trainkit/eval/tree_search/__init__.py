"""The search for the static draft tree that decodes fastest on a machine."""
