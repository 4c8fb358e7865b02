"""verify: accept a prefix of the drafted tokens and choose the next one, greedy or lossless sampling."""
