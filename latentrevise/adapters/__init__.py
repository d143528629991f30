"""Zero-hit groups repaired inside other trainers: verl, prime-rl, slime, OpenRLHF, SkyRL, TRL's asynchronous one.
See docs/adapters.md.

Each module is one plug-in at a hook that its framework documents, and imports that framework only where the hook needs
it. ``core`` is what they share.
"""
