"""Procedural scenes with exact captions, and the judge that says whether a picture shows its caption."""
