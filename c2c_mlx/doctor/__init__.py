"""Whether the numbers are right on this very device, and how fast they come."""
