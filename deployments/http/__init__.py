"""The HTTP surface: routes, headers, encodings, the OpenAPI document and its page, ``/metrics``."""
