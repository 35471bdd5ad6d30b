"""Launchers for images: ``docker run`` and Kubernetes."""
