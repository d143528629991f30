"""The frozen policy: loading it, whether it can share a prefix, its head, caches, packed passes and their memory."""
