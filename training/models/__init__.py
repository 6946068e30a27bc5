"""Models on disk and in memory: where they lie, how they are read and written, and pictures from them."""
