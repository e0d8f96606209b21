"""What a method declares (Method, Config) and what it is given (Site, the low-rank helpers)."""
