"""The Ray Serve application of the guard.

Rooms, each importing only from those before it: ``errors config`` ← ``policy bodies images batcher metrics`` ←
``protocol plain passes`` ← ``classifier`` ← ``ingress exposition`` ← ``app`` ← ``serve``. Everything before ``app`` is
plain Python, without Ray, and tested so.
"""
