"""Everything that makes the embedded pipeline: its scenes, its autoencoder, its judge and its teacher."""
