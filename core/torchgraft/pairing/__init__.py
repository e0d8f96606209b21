"""Does this adapter fit this base, and under which names?"""
