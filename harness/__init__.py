"""A real ComfyUI for the demo, the tests and the measurements: server, page, graphs, and an independent reference."""
