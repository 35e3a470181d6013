"""One file a peer: what plum is measured beside, called as its own users call it.

A file imports its library where it is loaded, so a peer that is not installed is an ImportError
there. Its functions take tensors, do what a user does once (build an index, convert to numpy), and
return the call to time.
"""

from __future__ import annotations


class PeerAbsent(Exception):
    """A peer is not on this machine; the message says what is missing."""
