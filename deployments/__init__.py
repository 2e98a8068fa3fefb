"""The Ray Serve application of the guard.

Rooms, each importing only from those before it: ``errors config policy images protocol batcher metrics classifier
ingress app serve``. Everything up to ``ingress`` is plain Python and tested without Ray.
"""
