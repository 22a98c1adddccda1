"""Processes: the launcher they come from, how they agree, how they end, what they lock, and what they read ahead."""
