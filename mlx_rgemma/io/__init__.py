"""Files, memory and the Hub."""
