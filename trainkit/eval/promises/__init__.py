"""`trainkit verify`: checks of a drafter, each of one promise, and the certificate that records them."""
