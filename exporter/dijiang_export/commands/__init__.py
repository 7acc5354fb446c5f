"""One module per command: it parses options, calls one function, and prints the result."""
