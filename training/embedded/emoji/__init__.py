"""What makes the next embedded pipeline, of emoji scenes; it takes the place of the shapes' when it is finished."""
