"""SPLAM in Automatic1111, Forge and reForge; `scripts/splam.py` is what these hosts load.

The name is not `webui`: that is the host's own start-up module, already imported when extensions load.
Every module is imported while the host loads the script: only then is the extension's folder on sys.path everywhere.
"""
