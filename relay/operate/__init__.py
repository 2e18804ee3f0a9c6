"""What is at hand for who operates a relay: looks at a running one, and at what it keeps."""
