"""Fuzzing of everything that comes from outside: files, flags, requests. See README.md."""
