"""A stand-in for the package `modules` of Automatic1111, Forge and reForge: the members that `splam_webui` uses.

HOST says which of the three it is. What a host computes on the way from a request to latents is here in our own words;
pictures, prompts' text, devices and pages are left out.
"""

import os

HOST = os.environ["STAND_IN_HOST"]  # "a1111", "forge" or "reforge"
