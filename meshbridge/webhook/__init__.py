"""Admission: what whoever applies a pod or a policy is told, and what is refused."""
